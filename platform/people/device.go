package people

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"sallyway/internal/control"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Login of programs: with a code that a person types into a browser anywhere (RFC 8628), or by way of a browser on the same host, which
// brings a code to a loopback address of the program (RFC 8252 with PKCE, RFC 7636). Either ends in an access token of the person.

// Limits of device logins.
const (
	deviceWait     = 10 * time.Minute    // from the start to the approval
	deviceInterval = 5 * time.Second     // between polls
	devicePending  = 20                  // of one source at once
	codeLife       = 2 * time.Minute     // of the code that a browser brings to a program
	ProgramLife    = 30 * 24 * time.Hour // of the token that a program gets
)

// userDigits is the length of the code that a person types: 40 random bits, for ten minutes, with guesses slowed down (RFC 8628 §5.1).
const userDigits = 8

const ticketCode = "code"

// The states of a device login.
const (
	devicePendingState = "pending"
	deviceApproved     = "approved"
	deviceDenied       = "denied"
)

// StartDevice begins a login with a code.
func (s *Service) StartDevice(ctx context.Context, req control.StartDevice, source string) (*control.DeviceStarted, error) {
	out := &control.DeviceStarted{
		DeviceCode: secret(), UserCode: strings.ToUpper(words(userDigits, 4)), URL: s.reg.URL + "/device",
		Life: int(deviceWait / time.Second), Interval: int(deviceInterval / time.Second),
	}
	out.URLWhole = out.URL + "?user_code=" + out.UserCode // as the page reads it
	err := s.reg.Transact(ctx, func(c *registry.Change) error {
		n, err := c.CountDeviceLogins(ctx, source, c.Now())
		if err != nil {
			return err
		}
		if n >= devicePending {
			return slowDown(deviceWait / 2)
		}
		return c.InsertDeviceLogin(ctx, &store.DeviceLogin{
			Hash: hashOf(out.DeviceCode), UserCode: hashOf(plain(out.UserCode)), State: devicePendingState, Client: clip(oneLine(req.Client), 100), Source: clip(source, 64),
			Created: c.Now(), Expires: c.Now().Add(deviceWait),
		})
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// oneLine takes control characters out of foreign text that is shown.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

// WaitingDevice is a program that waits for an approval, as the approval page shows it.
type WaitingDevice struct {
	Client  string // what the program says of itself: not to be trusted
	Source  string // where it asked from
	Created time.Time
	Expires time.Time
}

func errNoDevice() error {
	return registry.Refuse(http.StatusNotFound, control.CodeNotFound, "see that you typed it right; it is good for ten minutes: run sallyway login again for a fresh one", "no program waits with this code")
}

// Device finds the program that shows a code.
func (s *Service) Device(ctx context.Context, by *Principal, userCode string) (*WaitingDevice, error) {
	if err := s.mayApprove(by); err != nil {
		return nil, err
	}
	// The codes are short: a person may be wrong a few times.
	account := ofAccount("device", by.ID, "")
	if err := s.guard.try(s.reg.Now(), account); err != nil {
		return nil, err
	}
	var d *store.DeviceLogin
	err := s.reg.Store.View(ctx, func(tx store.Tx) (err error) {
		d, err = tx.FindDeviceLogin(ctx, hashOf(plain(userCode)))
		return err
	})
	if notFound(err) || err == nil && (d.State != devicePendingState || !s.reg.Now().Before(d.Expires)) {
		return nil, errNoDevice()
	}
	if err != nil {
		return nil, err
	}
	s.guard.succeeded(account, guess{})
	return &WaitingDevice{Client: d.Client, Source: d.Source, Created: d.Created, Expires: d.Expires}, nil
}

// mayApprove lets persons with a browser's session approve: a token can not make more tokens of the whole person.
func (s *Service) mayApprove(by *Principal) error {
	if err := by.person(); err != nil {
		return err
	}
	if by.Session == nil {
		return forbidden("open the page in a browser and log in", "a program can not approve the login of a program")
	}
	return nil
}

// DecideDevice approves or denies the login of the program that shows a code. Of several decisions the first counts.
func (s *Service) DecideDevice(ctx context.Context, by *Principal, userCode string, approve bool) error {
	d, err := s.Device(ctx, by, userCode)
	if err != nil {
		return err
	}
	state := deviceDenied
	if approve {
		state = deviceApproved
	}
	return s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		if err := c.DecideDeviceLogin(ctx, hashOf(plain(userCode)), state, p.ID, c.Now()); err != nil {
			if notFound(err) {
				return errNoDevice()
			}
			return err
		}
		return c.Record(ctx, p.Org, "program.login."+state, "person/"+p.ID, map[string]any{"login": p.Login, "client": d.Client, "source": d.Source})
	})
}

// grantError is a refusal of a program's login in words of RFC 6749 §5.2 and RFC 8628 §3.5.
func grantError(code, remedy, text string) error {
	return registry.Refuse(http.StatusBadRequest, code, remedy, "%s", text)
}

// Take gives a program its token once its login is approved.
func (s *Service) Take(ctx context.Context, req control.TakeToken, source string) (*control.TokenTaken, error) {
	switch req.Grant {
	case control.GrantDevice:
		return s.takeDevice(ctx, req.DeviceCode, source)
	case control.GrantCode:
		return s.takeCode(ctx, req, source)
	}
	return nil, grantError("unsupported_grant_type", "device_code or authorization_code", "the grant type is not known")
}

func (s *Service) takeDevice(ctx context.Context, code, source string) (*control.TokenTaken, error) {
	expired := grantError(control.CodeExpired, "run sallyway login again", "the code is too old, used, or was never given out")
	denied := false
	var out *control.TokenTaken
	var poll error
	err := s.reg.Transact(ctx, func(c *registry.Change) error {
		out, poll, denied = nil, nil, false
		d, err := c.DeviceLogin(ctx, hashOf(code))
		if notFound(err) || err == nil && !c.Now().Before(d.Expires) {
			return expired
		}
		if err != nil {
			return err
		}
		if d.State == devicePendingState {
			poll = grantError(control.CodePending, "approve it in the browser", "the login is not approved yet")
			if !d.Polled.IsZero() && c.Now().Sub(d.Polled) < deviceInterval-time.Second {
				poll = grantError(control.CodeSlowDown, "ask less often", "too many questions")
			}
			return c.PollDeviceLogin(ctx, d.Hash, c.Now())
		}
		// The one statement that decides who of several gets the token.
		if d, err = c.SpendDeviceLogin(ctx, d.Hash, c.Now()); err != nil {
			if notFound(err) {
				return expired
			}
			return err
		}
		if denied = d.State != deviceApproved; denied {
			return nil // the login is spent all the same
		}
		out, err = s.programToken(ctx, c, d.Person, d.Client, source)
		return err
	})
	switch {
	case err != nil:
		return nil, err
	case poll != nil:
		return nil, poll
	case denied:
		return nil, grantError(control.CodeDenied, "", "the login was denied in the browser")
	}
	return out, nil
}

// programToken makes the token of a program that a person let in.
func (s *Service) programToken(ctx context.Context, c *registry.Change, person, client, source string) (*control.TokenTaken, error) {
	p, err := c.Person(ctx, person)
	if notFound(err) || err == nil && p.Disabled {
		return nil, grantError(control.CodeDenied, "", "the account is disabled")
	}
	if err != nil {
		return nil, err
	}
	have, err := c.PersonTokens(ctx, p.ID)
	if err != nil {
		return nil, err
	}
	if err := maxLive(have, c.Now()); err != nil {
		return nil, err
	}
	t := &store.AccessToken{Person: p.ID, Name: clip("login: "+client, 64)}
	token, err := newToken(ctx, c, personPrefix, t, ProgramLife)
	if err != nil {
		return nil, err
	}
	err = c.Record(registry.WithActor(ctx, personActor(p.Login)), p.Org, "program.login", "person/"+p.ID, map[string]any{"login": p.Login, "token": t.ID, "client": client, "source": source})
	return &control.TokenTaken{Token: token, Type: "Bearer", Expires: t.Expires, Login: p.Login}, err
}

// ProgramLogin is what a program asks for when it sends a browser to /login/program with these as query parameters.
type ProgramLogin struct {
	Redirect  string // redirect_uri: http://127.0.0.1:PORT/… or http://[::1]:PORT/…
	State     string // state: goes back as it is
	Challenge string // code_challenge: base64url of SHA-256 of the verifier (RFC 7636 §4.2)
	Client    string // client: what the program says of itself
}

// ParseProgramLogin checks what a browser was sent with.
func ParseProgramLogin(q url.Values) (*ProgramLogin, error) {
	l := &ProgramLogin{Redirect: q.Get("redirect_uri"), State: q.Get("state"), Challenge: q.Get("code_challenge"), Client: clip(oneLine(q.Get("client")), 100)}
	bad := func(what string) error {
		return registry.Refuse(http.StatusBadRequest, control.CodeInvalid, "update sallyway on that host, and run sallyway login again", "the program's %s", what)
	}
	if err := checkLoopback(l.Redirect); err != nil {
		return nil, bad("address is not one of this host: " + err.Error())
	}
	if b, err := base64.RawURLEncoding.DecodeString(l.Challenge); err != nil || len(b) != sha256.Size || q.Get("code_challenge_method") != "S256" {
		return nil, bad("code challenge is missing or not S256")
	}
	if len(l.State) < 16 || len(l.State) > 200 {
		return nil, bad("state is missing")
	}
	return l, nil
}

// checkLoopback lets addresses of the person's own host pass only (RFC 8252 §7.3, §8.3): never a name.
func checkLoopback(s string) error {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || len(s) > 200 {
		return errors.New("want http://127.0.0.1:PORT/PATH")
	}
	host, _, err := net.SplitHostPort(u.Host)
	if err != nil {
		return errors.New("no port")
	}
	if a, err := netip.ParseAddr(host); err != nil || (a != netip.AddrFrom4([4]byte{127, 0, 0, 1}) && a != netip.IPv6Loopback()) {
		return errors.New("not a loopback address")
	}
	return nil
}

// codeData is what a program's code is good for.
type codeData struct {
	Challenge, Redirect, Client string
}

// ApproveProgram lets a program of the same host in and returns where the browser goes: the program's address with a code in it. Ask the
// person first, in a form with a CSRF token.
func (s *Service) ApproveProgram(ctx context.Context, by *Principal, l *ProgramLogin) (redirect string, err error) {
	if err := s.mayApprove(by); err != nil {
		return "", err
	}
	code := secret()
	data, err := json.Marshal(codeData{Challenge: l.Challenge, Redirect: l.Redirect, Client: l.Client})
	if err != nil {
		return "", err
	}
	err = s.own(ctx, by, func(c *registry.Change, p *store.Person) error {
		if err := c.InsertTicket(ctx, &store.Ticket{Hash: hashOf(code), Kind: ticketCode, Subject: p.ID, Data: data, Created: c.Now(), Expires: c.Now().Add(codeLife)}); err != nil {
			return err
		}
		return c.Record(ctx, p.Org, "program.login.approved", "person/"+p.ID, map[string]any{"login": p.Login, "client": l.Client})
	})
	if err != nil {
		return "", err
	}
	return l.Redirect + "?" + url.Values{"code": {code}, "state": {l.State}, "iss": {s.reg.URL}}.Encode(), nil
}

// DenyProgram is where the browser goes when the person says no.
func (s *Service) DenyProgram(l *ProgramLogin) (redirect string) {
	return l.Redirect + "?" + url.Values{"error": {control.CodeDenied}, "state": {l.State}, "iss": {s.reg.URL}}.Encode()
}

func (s *Service) takeCode(ctx context.Context, req control.TakeToken, source string) (*control.TokenTaken, error) {
	bad := grantError(control.CodeBadGrant, "run sallyway login again", "the code is too old, used, or not for this program")
	var out *control.TokenTaken
	refused := false
	err := s.reg.Transact(ctx, func(c *registry.Change) error {
		out, refused = nil, false
		t, err := c.SpendTicket(ctx, hashOf(req.Code), ticketCode, c.Now())
		if notFound(err) {
			return bad
		}
		if err != nil {
			return err
		}
		var d codeData
		if err := json.Unmarshal(t.Data, &d); err != nil {
			return err
		}
		sum := sha256.Sum256([]byte(req.Verifier))
		challenge := base64.RawURLEncoding.EncodeToString(sum[:])
		if len(req.Verifier) < 43 || subtle.ConstantTimeCompare([]byte(challenge), []byte(d.Challenge)) != 1 || req.Redirect != d.Redirect {
			refused = true // and spent: whoever has a code without its verifier has stolen it
			return nil
		}
		out, err = s.programToken(ctx, c, t.Subject, d.Client, source)
		return err
	})
	if err == nil && refused {
		err = errors.Join(bad, s.reg.Refused(ctx, Platform, "program.login", "code", control.CodeBadGrant, source))
	}
	if err != nil {
		return nil, err
	}
	return out, nil
}
