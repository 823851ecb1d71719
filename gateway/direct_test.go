package gateway

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"sallyway/client"
	"sallyway/direct"
	"sallyway/internal/control"
	"sallyway/tunnel"
)

// TestDirectIsAskedForSeldom: what a peer asks for is answered, once in five seconds, with an offer or the reason why there is none; and
// the organization's setting holds from the moment that it comes.
func TestDirectIsAskedForSeldom(t *testing.T) {
	x := startSite(t)
	answers := make(chan direct.Offer, 10)
	x.notice = func(n tunnel.Notice) {
		if n.Type != client.NoticeDirect {
			return
		}
		o, err := direct.ParseOffer(n.Data)
		if err != nil {
			t.Error(err)
		}
		answers <- o
	}
	s, err := x.dial()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close("test over")
	ask := func(data string) direct.Offer {
		t.Helper()
		if err := s.Notify(tunnel.Notice{Type: client.NoticeDirect, Data: json.RawMessage(data)}); err != nil {
			t.Fatal(err)
		}
		select {
		case o := <-answers:
			return o
		case <-time.After(10 * time.Second):
			t.Fatal("no answer")
		}
		return direct.Offer{}
	}
	x.poll("the organization's setting", func() bool { return x.gateway.direct.policy.Load().On })
	for _, step := range []struct{ data, want string }{
		{`{"candidates":["198.51.100.7:x"]}`, "not understood"},
		{`{"candidates":["198.51.100.7:40000"]}`, "no relay answers"}, // there is none here
		{`{"candidates":["198.51.100.7:40000"]}`, "too often"},
	} {
		if o := ask(step.data); !strings.Contains(o.Refused, step.want) || len(o.Candidates) > 0 {
			t.Errorf("%s: %+v, want %q", step.data, o, step.want)
		}
	}
	if st := x.gateway.direct.stats(); st.Probed > 0 || st.Peers > 0 {
		t.Errorf("the gateway sent probes: %+v", st)
	}
	off := false
	if _, err := x.srv.Registry().UpdateOrg(t.Context(), "default", control.UpdateOrganization{Direct: &off}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	x.poll("the change", func() bool { return !x.gateway.direct.policy.Load().On })
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the change took %v", took)
	}
	if o := ask(`{}`); !strings.Contains(o.Refused, "the organization allows no direct paths") {
		t.Errorf("%+v", o)
	}
}
