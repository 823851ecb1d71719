package client

import (
	"context"
	"log/slog"
	"slices"
	"testing"

	"sallyway/internal/control"
)

// A relay whose name does not resolve for a moment gets no route over it.
func TestProtectedOutlivesTheResolver(t *testing.T) {
	h := &Host{cfg: HostConfig{Platform: "https://localhost:8443", Logger: slog.New(slog.DiscardHandler)}}
	d := &control.Dialling{Gateways: []control.GatewayRef{{Relays: []control.RelayRef{{Host: "198.51.100.7"}}}}}
	before := h.protected(t.Context(), d)
	if !slices.Contains(before, addrs("127.0.0.1")[0]) && !slices.Contains(before, addrs("::1")[0]) {
		t.Fatalf("localhost is %v", before)
	}
	failing, cancel := context.WithCancel(t.Context())
	cancel()
	if now := h.protected(failing, d); !slices.Equal(now, before) {
		t.Errorf("%v are protected, were %v", now, before)
	}
	h.cfg.Proxy = "192.0.2.80"
	if now := h.protected(failing, d); !slices.Contains(now, addrs("192.0.2.80")[0]) {
		t.Errorf("the egress proxy is not protected: %v", now)
	}
	if now := h.protected(failing, &control.Dialling{}); slices.Contains(now, addrs("198.51.100.7")[0]) {
		t.Errorf("a relay that is not configured any more is protected: %v", now)
	}
}
