package main

import (
	"net/netip"
	"testing"

	"dnsgateway/gateway/config"
)

// TestAnswersWhom names the transports that there are, and no others.
func TestAnswersWhom(t *testing.T) {
	lan := config.Access{Set: true, Otherwise: config.Drop, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("::1/128")}}
	for _, tt := range []struct {
		name   string
		listen []config.Scheme
		access config.Access
		want   string
	}{
		{"plain", []config.Scheme{config.DNS}, config.Access{}, "loopback and private networks over plain DNS; others are refused"},
		{"UDP", []config.Scheme{config.UDP}, config.Access{}, "loopback and private networks over plain DNS; others are refused"},
		{"TCP and one", []config.Scheme{config.TCP, config.QUIC}, config.Access{},
			"loopback and private networks over plain DNS, anyone over DoQ; others are refused"},
		{"two", []config.Scheme{config.QUIC, config.DNS, config.TLS, config.QUIC}, config.Access{},
			"loopback and private networks over plain DNS, anyone over DoT and DoQ; others are refused"},
		{"all", []config.Scheme{config.DNS, config.TLS, config.HTTPS, config.QUIC}, config.Access{},
			"loopback and private networks over plain DNS, anyone over DoT, DoH and DoQ; others are refused"},
		{"nothing plain", []config.Scheme{config.HTTPS}, config.Access{}, "anyone over DoH"},
		{"a list", []config.Scheme{config.DNS, config.TLS}, lan, "192.0.2.0/24, ::1/128; others get no answer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := &config.Config{Access: tt.access}
			for _, scheme := range tt.listen {
				cfg.Listen = append(cfg.Listen, config.Listener{Scheme: scheme})
			}
			if got := answersWhom(cfg); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
