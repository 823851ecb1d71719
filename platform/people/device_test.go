package people

import (
	"crypto/sha256"
	"encoding/base64"
	"net/url"
	"strings"
	"testing"
	"time"

	"sallyway/internal/control"
)

func (l *lab) take(d *control.DeviceStarted) (*control.TokenTaken, error) {
	return l.svc.Take(l.t.Context(), control.TakeToken{Grant: control.GrantDevice, DeviceCode: d.DeviceCode}, "198.51.100.1")
}

func TestDeviceLogin(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	ada, eve := l.person("acme", "ada", Member), l.person("acme", "eve", Member)
	start := func() *control.DeviceStarted {
		d, err := l.svc.StartDevice(ctx, control.StartDevice{Client: "sallyway of ada\x1b[2J on laptop"}, "198.51.100.1")
		must(t, err)
		return d
	}
	d := start()
	_, err := l.take(d)
	code(t, err, control.CodePending)
	_, err = l.take(d)
	code(t, err, control.CodeSlowDown)
	l.advance(deviceInterval)
	_, err = l.take(d)
	code(t, err, control.CodePending)

	w, err := l.svc.Device(ctx, ada, strings.ToLower(strings.ReplaceAll(d.UserCode, "-", " ")))
	must(t, err)
	if strings.Contains(w.Client, "\x1b") || w.Source != "198.51.100.1" {
		t.Errorf("%+v", w)
	}
	// The first decision counts: of many at once, and the token is taken once.
	errs := atOnce(8, func(i int) error {
		by := ada
		if i%2 == 1 {
			by = eve
		}
		return l.svc.DecideDevice(ctx, by, d.UserCode, true)
	})
	if n := succeeded(errs); n != 1 {
		t.Errorf("%d approvals: %v", n, errs)
	}
	tokens := make([]*control.TokenTaken, 8)
	errs = atOnce(len(tokens), func(i int) (err error) {
		tokens[i], err = l.take(d)
		return err
	})
	if n := succeeded(errs); n != 1 {
		t.Errorf("%d tokens: %v", n, errs)
	}
	for _, tok := range tokens {
		if tok == nil {
			continue
		}
		p, err := l.svc.Authenticate(ctx, tok.Token, "198.51.100.1")
		must(t, err)
		if p.Name != tok.Login || p.Session != nil {
			t.Errorf("%+v for %+v", p, tok)
		}
		// A program's token approves nothing, and goes when the program logs out.
		_, err = l.svc.Device(ctx, p, start().UserCode)
		code(t, err, control.CodeForbidden)
		must(t, l.svc.ForgetToken(ctx, p))
		_, err = l.svc.Authenticate(ctx, tok.Token, "198.51.100.1")
		code(t, err, control.CodeTokenUnknown)
	}

	// Denied is denied, once.
	d = start()
	must(t, l.svc.DecideDevice(ctx, ada, d.UserCode, false))
	code(t, l.svc.DecideDevice(ctx, ada, d.UserCode, true), control.CodeNotFound)
	_, err = l.take(d)
	code(t, err, control.CodeDenied)
	_, err = l.take(d)
	code(t, err, control.CodeExpired)

	// Too late for either.
	d = start()
	l.advance(deviceWait)
	_, err = l.svc.Device(ctx, ada, d.UserCode)
	code(t, err, control.CodeNotFound)
	_, err = l.take(d)
	code(t, err, control.CodeExpired)
	d = start()
	must(t, l.svc.DecideDevice(ctx, ada, d.UserCode, true))
	l.advance(deviceWait)
	_, err = l.take(d)
	code(t, err, control.CodeExpired)

	// Codes can not be guessed, and one source has so many and no more.
	limited := false
	for range 20 {
		if _, err := l.svc.Device(ctx, eve, "AAAA-AAAA"); strings.Contains(err.Error(), "too many") {
			limited = true
		}
	}
	if !limited {
		t.Error("user codes can be guessed")
	}
	var full error
	for range devicePending + 1 {
		_, full = l.svc.StartDevice(ctx, control.StartDevice{}, "198.51.100.2")
	}
	code(t, full, control.CodeRateLimited)
	if !l.audited("acme", "program.login.approved", "ok") || !l.audited("acme", "program.login.denied", "ok") || !l.audited("acme", "program.login", "ok") {
		t.Error("not in the audit")
	}
}

func challenge(verifier string) string {
	sum := sha256.Sum256([]byte(verifier))
	return base64.RawURLEncoding.EncodeToString(sum[:])
}

func TestProgramLogin(t *testing.T) {
	l := newLab(t)
	ctx := t.Context()
	ada := l.person("acme", "ada", Member)
	verifier := secret()
	good := url.Values{
		"redirect_uri": {"http://127.0.0.1:4711/done"}, "state": {secret()}, "code_challenge": {challenge(verifier)}, "code_challenge_method": {"S256"}, "client": {"x"},
	}
	for _, to := range []string{
		"", "http://localhost:1/done", "http://127.0.0.1/done", "https://127.0.0.1:1/done", "http://evil.example:1/", "http://127.0.0.1:1@evil.example/", "http://127.0.0.1.evil.example:1/",
		"http://127.0.0.1:1/?x=1", "http://127.0.0.1:1/#x", "http://10.0.0.1:1/", "//127.0.0.1:1/", "http://[::ffff:127.0.0.1]:1/", "javascript:alert(1)", "http://127.0.0.2:1/",
	} {
		q := url.Values{}
		for k, v := range good {
			q[k] = v
		}
		q.Set("redirect_uri", to)
		if _, err := ParseProgramLogin(q); err == nil {
			t.Errorf("%q is taken", to)
		}
	}
	for k, bad := range map[string]string{"state": "short", "code_challenge": "x", "code_challenge_method": "plain"} {
		q := url.Values{}
		for k, v := range good {
			q[k] = v
		}
		q.Set(k, bad)
		if _, err := ParseProgramLogin(q); err == nil {
			t.Errorf("%s=%q is taken", k, bad)
		}
	}
	approve := func() string {
		t.Helper()
		p, err := ParseProgramLogin(good)
		must(t, err)
		to, err := l.svc.ApproveProgram(ctx, ada, p)
		must(t, err)
		u, err := url.Parse(to)
		must(t, err)
		if u.Host != "127.0.0.1:4711" || u.Query().Get("state") != good.Get("state") || u.Query().Get("iss") != l.reg.URL {
			t.Errorf("%s", to)
		}
		return u.Query().Get("code")
	}
	take := func(code, verifier, redirect string) (*control.TokenTaken, error) {
		return l.svc.Take(ctx, control.TakeToken{Grant: control.GrantCode, Code: code, Verifier: verifier, Redirect: redirect}, "192.0.2.1")
	}
	redirect := good.Get("redirect_uri")
	c := approve()
	tokens := make([]*control.TokenTaken, 6)
	errs := atOnce(len(tokens), func(i int) (err error) {
		tokens[i], err = take(c, verifier, redirect)
		return err
	})
	if n := succeeded(errs); n != 1 {
		t.Errorf("%d tokens for one code: %v", n, errs)
	}
	// A code that somebody else has is worth nothing, and is spent by the try.
	for _, tc := range [][2]string{{secret(), redirect}, {verifier, "http://127.0.0.1:4712/done"}, {"", redirect}} {
		c := approve()
		_, err := take(c, tc[0], tc[1])
		code(t, err, control.CodeBadGrant)
		_, err = take(c, verifier, redirect)
		code(t, err, control.CodeBadGrant)
	}
	c = approve()
	l.advance(codeLife + time.Second)
	_, err := take(c, verifier, redirect)
	code(t, err, control.CodeBadGrant)
	_, err = l.svc.Take(ctx, control.TakeToken{Grant: "password"}, "192.0.2.1")
	code(t, err, "unsupported_grant_type")
	if p, _ := ParseProgramLogin(good); !strings.Contains(l.svc.DenyProgram(p), "error=access_denied") {
		t.Error("no word of a denial")
	}
}
