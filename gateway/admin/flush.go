package admin

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// allowed says whether a request may change something, and answers it if not. Three kinds of requests may not:
//
// Those of a browser. There is no page here, so that whatever sends one is a page of somebody else: a browser lets any page
// send a POST to any address, 127.0.0.1 included, and only keeps the answer from it. Browsers add Origin to every POST and
// Sec-Fetch-Site where they trust the address, and no page can leave them out; other clients send neither. What they say does
// not matter: after DNS rebinding a page is of the same origin.
//
// Those without the token, if there is one.
//
// If there is none, those that came to an address which other machines reach.
func (s *Server) allowed(w http.ResponseWriter, r *http.Request) bool {
	for _, name := range []string{"Origin", "Sec-Fetch-Site"} {
		if r.Header.Values(name) != nil {
			refuse(w, http.StatusForbidden, "a request with "+name+" comes from a page in a browser, and such a page may change nothing here")
			return false
		}
	}
	if s.cfg.Token == "" {
		if !s.local() {
			refuse(w, http.StatusForbidden,
				"without a token changes are only taken on a loopback address: set admin.token, or admin.listen to 127.0.0.1")
			return false
		}
		return true
	}
	if !hasToken(r.Header.Values("Authorization"), s.cfg.Token) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="dnsgateway"`)
		refuse(w, http.StatusUnauthorized, "this takes the header Authorization: Bearer TOKEN, with the token of admin.token")
		return false
	}
	return true
}

// hasToken reports whether the request's one Authorization header has the token (RFC 6750, section 2.1). How long it takes
// tells nothing about the token, not even its length.
func hasToken(headers []string, token string) bool {
	if len(headers) != 1 {
		return false
	}
	scheme, got, _ := strings.Cut(headers[0], " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return false
	}
	a, b := sha256.Sum256([]byte(strings.TrimSpace(got))), sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1
}

// flush answers POST /cache/flush.
func (s *Server) flush(w http.ResponseWriter, r *http.Request) {
	if !s.allowed(w, r) {
		return
	}
	name, below, err := flushWhat(r)
	if err != nil {
		refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	if s.cfg.Flush == nil {
		refuse(w, http.StatusConflict, "the cache is off: there is nothing to flush")
		return
	}
	n, err := s.cfg.Flush(r.Context(), name, below)
	if errors.Is(err, ErrStopping) {
		refuse(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, "name: "+err.Error())
		return
	}
	reply(w, http.StatusOK, jsonType, fmt.Sprintf("{\"flushed\": %d}\n", n))
}

// flushWhat reads what is to be forgotten: everything if name is "". It takes nothing that it does not know, as the
// misspelled name of one name would be the whole cache.
func flushWhat(r *http.Request) (name string, below bool, err error) {
	if r.ContentLength != 0 {
		return "", false, errors.New("there is no body to send; a name goes into the URL: /cache/flush?name=example.com")
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return "", false, errors.New("what stands behind the question mark cannot be read; want name=example.com")
	}
	for key, values := range query {
		if key != "name" && key != "below" {
			return "", false, errors.New("there are no parameters but name and below")
		}
		if len(values) != 1 {
			return "", false, fmt.Errorf("%s stands there more than once", key)
		}
	}
	if !query.Has("name") {
		if query.Has("below") {
			return "", false, errors.New("below needs a name; without both the whole cache is flushed")
		}
		return "", false, nil
	}
	if name = query.Get("name"); name == "" {
		return "", false, errors.New("the name is empty; the root is written as one dot, and without a name the whole cache is flushed")
	}
	switch query.Get("below") {
	case "true":
		return name, true, nil
	case "false":
		return name, false, nil
	}
	if query.Has("below") {
		return "", false, errors.New("below is true or false")
	}
	return name, false, nil
}

// refuse says why not.
func refuse(w http.ResponseWriter, status int, why string) {
	body, err := json.Marshal(struct {
		Error string `json:"error"`
	}{why})
	if err != nil {
		panic(fmt.Sprintf("admin: a string cannot be JSON: %v", err))
	}
	reply(w, status, jsonType, string(body)+"\n")
}
