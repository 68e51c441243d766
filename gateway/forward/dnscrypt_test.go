package forward

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/AdguardTeam/dnscrypt"
	"github.com/miekg/dns"
)

// TestDNSCrypt asks a DNSCrypt server through the framework's client.
func TestDNSCrypt(t *testing.T) {
	rc := must(dnscrypt.GenerateResolverConfig("dns.test", nil, time.Hour))
	asked := make(chan *dns.Msg, 1)
	srv := must(dnscrypt.NewServer(&dnscrypt.ServerConfig{
		Logger: discard, ResolverCert: must(rc.NewCert()), ProviderName: rc.ProviderName, Proto: dnscrypt.ProtoUDP,
		Addr: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), deadPort("udp")),
		Handler: dnscrypt.HandlerFunc(func(ctx context.Context, rw dnscrypt.ResponseWriter, m *dns.Msg) error {
			asked <- m
			r := new(dns.Msg)
			r.SetReply(m)
			r.Answer = []dns.RR{must(dns.NewRR(`name.test. 60 TXT "crypt"`))}
			return rw.WriteMsg(ctx, r)
		}),
	}))
	if err := srv.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer srv.Shutdown(context.Background())
	stamp := must(rc.CreateStamp(srv.LocalAddr().String()))
	s := Server{URL: stamp.String(), Scheme: "sdns"}
	g := newTestGroup(t, Config{Tiers: [][]Server{{s}}})
	req := question("name.test.")
	req.SetEdns0(4096, false)
	req.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: dns.EDNS0COOKIE, Cookie: "0123456789abcdef"}}
	resp, err := g.Exchange(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if resp.Id != req.Id || text(resp) != "crypt" {
		t.Errorf("got\n%s", resp)
	}
	if m := <-asked; len(m.IsEdns0().Option) != 0 {
		t.Errorf("the client's EDNS options went upstream:\n%s", m)
	}
	s.Pins = make([][32]byte, 1)
	if _, err := newClient(s, environment{}); err == nil {
		t.Error("pins with DNSCrypt: got no error")
	}
}
