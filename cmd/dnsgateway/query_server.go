package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"github.com/ameshkov/dnsstamps"
)

// queryServer is a server to ask, as the command line named it.
type queryServer struct {
	text   string // as written
	scheme string // dns udp tcp tls https h3 quic
	host   string // a name or an address without brackets
	port   uint16
	path   string // https and h3: path and query, from its slash
	verify string // the name or address that the certificate has to have
	// chainHashes are SHA-256 hashes of certificates' TBS parts, one of which the verified chain has to hold; from DNS
	// stamps only.
	chainHashes [][]byte
}

// queryPorts are the default ports of the schemes.
var queryPorts = map[string]uint16{
	"dns": 53, "udp": 53, "tcp": 53, "tls": 853, "quic": 853, "https": 443, "h3": 443,
}

func (s queryServer) encrypted() bool { return queryPorts[s.scheme] != 53 }

// address returns what to dial.
func (s queryServer) address() string { return net.JoinHostPort(s.host, strconv.Itoa(int(s.port))) }

// parseQueryServer reads a server as dig and the configuration file write it.
func parseQueryServer(text string) (queryServer, error) {
	s := queryServer{text: text}
	var err error
	switch scheme, _, isURL := strings.Cut(text, "://"); {
	case !isURL:
		err = s.parsePlain(text)
	case strings.EqualFold(scheme, "sdns"):
		err = s.parseStamp(text)
	default:
		err = s.parseURL(text)
	}
	if err != nil {
		return queryServer{}, fmt.Errorf("server @%s: %w", text, err)
	}
	return s, nil
}

// parsePlain reads an address or a name, with or without a port.
func (s *queryServer) parsePlain(text string) error {
	s.scheme, s.port = "dns", 53
	if strings.Contains(text, "#") {
		return errors.New("a name to verify is for encrypted servers; a port is written with a colon")
	}
	if _, err := netip.ParseAddr(text); err == nil {
		s.host = text
		return nil
	}
	host, port := text, ""
	if strings.Contains(text, ":") && !strings.HasSuffix(text, "]") {
		var err error
		if host, port, err = net.SplitHostPort(text); err != nil {
			return errors.New("neither an address nor ADDRESS:PORT; an IPv6 address with a port is [ADDRESS]:PORT")
		}
	} else {
		host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	}
	return s.setHostPort(host, port)
}

func (s *queryServer) setHostPort(host, port string) error {
	if host == "" {
		return errors.New("there is no host")
	}
	s.host = host
	if port == "" {
		return nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return fmt.Errorf("port %q is not between 1 and 65535", port)
	}
	s.port = uint16(n)
	return nil
}

func (s *queryServer) parseURL(text string) error {
	// A template's variable (RFC 8484, section 4.1) stands where the query goes by itself.
	u, err := url.Parse(strings.Replace(text, "{?dns}", "", 1))
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err // without the text again
		}
		return fmt.Errorf("not a URL: %w", err)
	}
	s.scheme = u.Scheme
	port, ok := queryPorts[u.Scheme]
	switch {
	case !ok:
		return fmt.Errorf("scheme %q is none of dns, udp, tcp, tls, https, h3, quic, sdns", u.Scheme)
	case u.User != nil:
		return errors.New("a user and password mean nothing here")
	case u.Fragment != "" && !s.encrypted():
		return fmt.Errorf("#%s: there is no certificate to verify over %s://", u.Fragment, u.Scheme)
	}
	s.port = port
	if err := s.setHostPort(u.Hostname(), u.Port()); err != nil {
		return err
	}
	if s.verify = u.Fragment; s.verify == "" {
		s.verify = s.host
	}
	if s.scheme == "https" || s.scheme == "h3" {
		if s.path = u.EscapedPath(); s.path == "" || s.path == "/" {
			s.path = "/dns-query"
		}
		if u.RawQuery != "" {
			s.path += "?" + u.RawQuery
		}
		return nil
	}
	if u.Path != "" && u.Path != "/" || u.RawQuery != "" {
		return fmt.Errorf("%q: only https:// and h3:// have a path", u.Path)
	}
	return nil
}

// parseStamp reads a DNS stamp, https://dnscrypt.info/stamps-specifications.
func (s *queryServer) parseStamp(text string) error {
	stamp, err := dnsstamps.NewServerStampFromString(text)
	if err != nil {
		return fmt.Errorf("not a DNS stamp: %w", err)
	}
	switch stamp.Proto {
	case dnsstamps.StampProtoTypePlain:
		s.scheme = "dns"
	case dnsstamps.StampProtoTypeDoH:
		s.scheme = "https"
		s.path = "/" + strings.TrimPrefix(stamp.Path, "/")
	case dnsstamps.StampProtoTypeTLS:
		s.scheme = "tls"
	case dnsstamps.StampProtoTypeDoQ:
		s.scheme = "quic"
	default:
		return fmt.Errorf("a stamp of %s cannot be asked; of plain DNS, DoH, DoT and DoQ can", stamp.Proto.String())
	}
	s.port = queryPorts[s.scheme]
	name, namePort := splitStampHost(stamp.ProviderName)
	host, port := splitStampHost(stamp.ServerAddrStr)
	if host == "" { // the address may be left out, in whole or all but the port
		host = name
	}
	if namePort != "" && (port == "" || port == strconv.Itoa(int(s.port))) {
		port = namePort // the stamp's reader has filled in a default that the name's port outranks
	}
	if err := s.setHostPort(host, port); err != nil {
		return err
	}
	if s.encrypted() {
		if s.verify = name; name == "" {
			s.verify = host
		}
		s.chainHashes = stamp.Hashes
	}
	return nil
}

// splitStampHost splits a host in a stamp, which may have a port, brackets, both or neither.
func splitStampHost(text string) (host, port string) {
	if h, p, err := net.SplitHostPort(text); err == nil {
		return h, p
	}
	return strings.TrimSuffix(strings.TrimPrefix(text, "["), "]"), ""
}
