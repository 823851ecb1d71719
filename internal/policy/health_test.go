package policy

import (
	"encoding/json"
	"testing"
)

func TestParseHealth(t *testing.T) {
	for _, s := range []string{"", "off", "tcp", "tcp:5432", "tls:443", "http", "http:8080/healthz", "https/ready?full=1", "https:8443/"} {
		h, err := ParseHealth(s)
		if err != nil {
			t.Errorf("%q: %v", s, err)
			continue
		}
		if got := h.String(); got != s {
			t.Errorf("%q comes back as %q", s, got)
		}
	}
	for _, s := range []string{":80", "/x", "icmp", "off:1", "off/x", "tcp:0", "tcp:65536", "tcp:x", "tcp:80/x", "http:80:80", "http// x", "http/\x00"} {
		if h, err := ParseHealth(s); err == nil {
			t.Errorf("%q is taken for %+v", s, h)
		}
	}
}

func TestResourceProbe(t *testing.T) {
	single := []PortRange{{5432, 5432}}
	for _, c := range []struct {
		name string
		r    Resource
		want string // host and probe, "" for none
	}{
		{"address and port", Resource{Address: "10.0.3.7", TCP: single}, "10.0.3.7 tcp:5432"},
		{"name", Resource{Address: "db.internal", TCP: single}, "db.internal tcp:5432"},
		{"first of several", Resource{Address: "10.0.3.7", TCP: []PortRange{{80, 80}, {443, 443}}}, "10.0.3.7 tcp:80"},
		{"a range alone says nothing", Resource{Address: "10.0.3.7", TCP: []PortRange{{8000, 8100}}}, ""},
		{"a range with a port to ask", Resource{Address: "10.0.3.7", TCP: []PortRange{{8000, 8100}}, Health: Health{Port: 8001, Kind: HealthTLS}}, "10.0.3.7 tls:8001"},
		{"off", Resource{Address: "10.0.3.7", TCP: single, Health: Health{Kind: HealthOff}}, ""},
		{"network", Resource{Address: "10.0.3.0/24", TCP: single}, ""},
		{"network of one", Resource{Address: "10.0.3.7/32", TCP: single}, "10.0.3.7 tcp:5432"},
		{"wildcard", Resource{Address: "*.internal", TCP: single}, ""},
		{"UDP only", Resource{Address: "10.0.3.7", UDP: single}, ""},
		{"http", Resource{Address: "web", TCP: single, Health: Health{Kind: HealthHTTP, Port: 80, Path: "/ok"}}, "web http:80/ok"},
	} {
		got := ""
		if host, h, ok := c.r.Probe(); ok {
			got = host + " " + h.String()
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestHealthInJSON(t *testing.T) {
	b, err := json.Marshal(Resource{Address: "a"})
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(b, &m); err != nil {
		t.Fatal(err)
	}
	if _, there := m["health"]; there {
		t.Errorf("the default is written: %s", b)
	}
	var r Resource
	if err := json.Unmarshal([]byte(`{"health":"tls:443"}`), &r); err != nil || r.Health != (Health{Kind: HealthTLS, Port: 443}) {
		t.Errorf("%+v, %v", r.Health, err)
	}
}
