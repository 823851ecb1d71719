package people

import (
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
)

// TestTOTPVectors are those of RFC 6238, Appendix B, cut to six digits.
func TestTOTPVectors(t *testing.T) {
	key := []byte("12345678901234567890")
	for at, want := range map[int64]string{59: "287082", 1111111109: "081804", 1111111111: "050471", 1234567890: "005924", 2000000000: "279037", 20000000000: "353130"} {
		if got := totpCode(key, totpStep(time.Unix(at, 0))); got != want {
			t.Errorf("at %d: %s, want %s", at, got, want)
		}
		now := time.Unix(at, 0)
		for d, ok := range map[time.Duration]bool{-2 * totpPeriod: false, -totpPeriod: true, 0: true, totpPeriod: true, 2 * totpPeriod: false} {
			if at < 60 && d < 0 {
				continue // before 1970
			}
			if _, got := totpMatch(key, want[:3]+" "+want[3:], now.Add(d)); got != ok {
				t.Errorf("%s at %v: %v", want, d, got)
			}
		}
	}
}

// factor turns a second factor on and returns its secret and recovery codes.
func (l *lab) factor(p *Principal) (key []byte, recovery []string) {
	l.t.Helper()
	ctx := l.t.Context()
	_, err := l.svc.BeginFactor(ctx, p, "wrong wrong wrong", "192.0.2.1")
	code(l.t, err, CodeBadLogin)
	f, err := l.svc.BeginFactor(ctx, p, password, "192.0.2.1")
	must(l.t, err)
	key, err = base32Plain.DecodeString(f.Secret)
	must(l.t, err)
	if !strings.HasPrefix(f.URL, "otpauth://totp/Sallyway:") {
		l.t.Errorf("URL %q", f.URL)
	}
	_, err = l.svc.ConfirmFactor(ctx, p, f.Ticket, "000000")
	code(l.t, err, CodeBadCode)
	recovery, err = l.svc.ConfirmFactor(ctx, p, f.Ticket, totpCode(key, totpStep(l.clock())))
	must(l.t, err)
	return key, recovery
}

func (l *lab) second(login string) string {
	l.t.Helper()
	r, err := l.svc.LogIn(l.t.Context(), Login{Name: login, Password: password, Source: "192.0.2.1"})
	must(l.t, err)
	if r.Session != nil || r.Second == "" {
		l.t.Fatalf("%+v", r)
	}
	return r.Second
}

func TestSecondFactor(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	ada := l.person("acme", "ada", Member)
	key, recovery := l.factor(ada)
	if len(recovery) != recoveryCodes {
		t.Fatalf("%q", recovery)
	}
	now := func() string { return totpCode(key, totpStep(l.clock())) }
	try := func(ticket, c string) error {
		_, err := l.svc.SecondFactor(ctx, ticket, c, "192.0.2.1", "test")
		return err
	}
	// The code that turned it on is used up.
	ticket := l.second("ada")
	code(t, try(ticket, now()), CodeBadCode)
	l.advance(totpPeriod)
	must(t, try(ticket, now()))
	code(t, try(ticket, now()), CodeTicketGone) // the login is done
	code(t, try("nothing", now()), CodeTicketGone)

	// A code that was used is not taken again, nor one before it; of many at once one gets in.
	ticket = l.second("ada")
	code(t, try(ticket, now()), CodeBadCode)
	code(t, try(ticket, totpCode(key, totpStep(l.clock())-1)), CodeBadCode)
	l.advance(maxDelay)
	tickets := make([]string, 6)
	for i := range tickets {
		tickets[i] = l.second("ada")
	}
	errs := atOnce(len(tickets), func(i int) error { return try(tickets[i], now()) })
	if n := succeeded(errs); n != 1 {
		t.Errorf("%d logins with one code: %v", n, errs)
	}

	// Recovery codes work once, in any spelling.
	l.advance(time.Hour)
	must(t, try(l.second("ada"), " "+strings.ToUpper(recovery[3])+" "))
	code(t, try(l.second("ada"), recovery[3]), CodeBadCode)
	if n, err := l.svc.RecoveryLeft(ctx, ada); err != nil || n != recoveryCodes-1 {
		t.Errorf("%d codes left, %v", n, err)
	}

	// Guesses are counted for the account, wherever they come from.
	l.advance(time.Hour)
	ticket = l.second("ada")
	limited := false
	for i := range 12 {
		_, err := l.svc.SecondFactor(ctx, ticket, "123456", "198.51.100."+string(rune('0'+i%10)), "test")
		if err != nil && strings.Contains(err.Error(), "too many") {
			limited = true
		}
	}
	if !limited {
		t.Error("codes can be guessed")
	}
	l.advance(2 * secondLife)
	code(t, try(ticket, now()), CodeTicketGone)

	// Off again, with the password, in a browser.
	code(t, l.svc.RemoveFactor(ctx, ada, "wrong wrong wrong", "192.0.2.1"), CodeBadLogin)
	must(t, l.svc.RemoveFactor(ctx, ada, password, "192.0.2.1"))
	l.session("ada")
}

func TestLostFactor(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	owner, ada := l.person("acme", "owner", Owner), l.person("acme", "ada", Admin)
	l.factor(ada)
	_, err := l.svc.ForgetFactor(ctx, ada, "acme", "owner")
	code(t, err, CodeReadOnly)
	p, err := l.svc.ForgetFactor(ctx, owner, "acme", "ada")
	must(t, err)
	if p.TOTP {
		t.Errorf("%+v", p)
	}
	l.session("ada")
}

// TestInvitationKeepsTheFactor: a link for a new password is no way around the second factor.
func TestInvitationKeepsTheFactor(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	owner, ada := l.person("acme", "owner", Owner), l.person("acme", "ada", Member)
	key, _ := l.factor(ada)
	i, err := l.svc.Invite(ctx, owner, "acme", "ada")
	must(t, err)
	link := i.URL[strings.Index(i.URL, "#")+1:]
	token, err := l.svc.CreateMyToken(ctx, ada, control.CreateAPIToken{Name: "x"})
	must(t, err)
	_, err = l.svc.AcceptInvite(ctx, link, "short", "192.0.2.1", "test")
	code(t, err, control.CodeInvalid)
	r, err := l.svc.AcceptInvite(ctx, link, "marble tunnel seven owls", "192.0.2.1", "test")
	must(t, err)
	if r.Session != nil || r.Second == "" {
		t.Fatalf("%+v", r)
	}
	l.advance(totpPeriod)
	if _, err := l.svc.SecondFactor(ctx, r.Second, totpCode(key, totpStep(l.clock())), "192.0.2.1", "test"); err != nil {
		t.Error(err)
	}
	_, err = l.svc.AcceptInvite(ctx, link, "another tunnel seven owls", "192.0.2.1", "test")
	code(t, err, CodeTicketGone)
	// What was open before is closed.
	_, err = l.svc.FromCookie(ctx, ada.Session.secret)
	code(t, err, CodeNoSession)
	_, err = l.svc.Authenticate(ctx, token.Token, "192.0.2.1")
	code(t, err, control.CodeTokenUnknown)
}
