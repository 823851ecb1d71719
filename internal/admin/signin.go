package admin

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
)

// Login of a person: by a browser of this host, which brings a code to a loopback address (RFC 8252), or with a code that is typed into a
// browser anywhere (RFC 8628).

// browserWait is how long a login may take in the browser.
const browserWait = 5 * time.Minute

// signIn logs a person in and returns the credential.
func (a *app) signIn(cmd *cobra.Command, cred control.AdminCredential, how string) (control.AdminCredential, error) {
	c, err := NewClient(cred, defaultOrg)
	if err != nil {
		return cred, daemon.Usagef("log in: %w", err)
	}
	defer c.Close()
	if how == "" {
		how = "device"
		if canBrowse() {
			how = "browser"
		}
	}
	var t control.TokenTaken
	if how == "browser" {
		t, err = a.byBrowser(cmd.Context(), cmd.ErrOrStderr(), c)
	} else {
		t, err = a.byDevice(cmd.Context(), cmd.ErrOrStderr(), c)
	}
	if err != nil {
		return cred, explain(c, "log in", err)
	}
	cred.Token = t.Token
	return cred, nil
}

// canBrowse says whether a browser may open on this host: somebody sits before a screen.
func canBrowse() bool {
	switch {
	case os.Getenv("SSH_CONNECTION") != "":
		return false
	case runtime.GOOS == "darwin":
		return true
	}
	return os.Getenv("DISPLAY") != "" || os.Getenv("WAYLAND_DISPLAY") != ""
}

// program is what the approval page shows of this program.
func program() string {
	host, err := os.Hostname()
	if err != nil {
		host = "a host without name"
	}
	name := "somebody"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	return "sallyway of " + name + " on " + host
}

// byDevice shows a code and waits until it is approved.
func (a *app) byDevice(ctx context.Context, w io.Writer, c *Client) (t control.TokenTaken, err error) {
	d, err := c.StartDeviceLogin(ctx, control.StartDevice{Client: program()})
	if err != nil {
		return t, err
	}
	fmt.Fprintf(w, "Open %s in a browser, log in, and type this code:\n\n    %s\n\nOr open %s\nApprove it only if you see this code there, and did this yourself. Waiting …\n", printable(d.URL), printable(d.UserCode), printable(d.URLWhole))
	ctx, cancel := context.WithTimeout(ctx, time.Duration(max(d.Life, 1))*time.Second)
	defer cancel()
	interval := time.Duration(max(d.Interval, 1)) * time.Second
	if a.poll < auditPoll { // tests
		interval = a.poll
	}
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return t, daemon.Failf("log in: nobody approved the code in time\nrun sallyway login again for a fresh one")
			}
			return t, ctx.Err()
		case <-tick.C:
		}
		t, err = c.TakeLoginToken(ctx, control.TakeToken{Grant: control.GrantDevice, DeviceCode: d.DeviceCode})
		var p *link.Problem
		switch {
		case err == nil:
			return t, nil
		case !errors.As(err, &p):
			var e *link.Error
			if errors.As(err, &e) && e.Kind != link.Pin && ctx.Err() == nil {
				continue // the way to the platform is broken for a moment (RFC 8628 §3.5)
			}
			return t, err
		case p.Code == control.CodePending:
		case p.Code == control.CodeSlowDown:
			interval += 5 * time.Second // RFC 8628 §3.5
			tick.Reset(interval)
		case p.Temporary():
		case p.Code == control.CodeDenied:
			return t, daemon.Failf("log in: it was denied in the browser")
		case p.Code == control.CodeExpired:
			return t, daemon.Failf("log in: the code is too old\nrun sallyway login again for a fresh one")
		default:
			return t, err
		}
	}
}

// random is a random text of 256 bits.
func random() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return base64.RawURLEncoding.EncodeToString(b)
}

// answerPage is what the browser shows at the end. It loads nothing and names nobody.
const answerPage = `<!doctype html><html lang="en"><meta charset="utf-8"><title>Sallyway</title><body style="font-family:sans-serif;margin:4em auto;max-width:30em"><h1>%s</h1><p>You can close this window.</p>`

// byBrowser sends a browser to the platform and waits for what it brings back.
func (a *app) byBrowser(ctx context.Context, w io.Writer, c *Client) (t control.TokenTaken, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return t, daemon.Failf("log in: %w\nuse a code instead: sallyway login --device", err)
	}
	verifier, state := random(), random()
	sum := sha256.Sum256([]byte(verifier))
	redirect := "http://" + l.Addr().String() + "/done"
	to := c.URL() + "/login/program?" + url.Values{
		"redirect_uri": {redirect}, "state": {state}, "code_challenge": {base64.RawURLEncoding.EncodeToString(sum[:])}, "code_challenge_method": {"S256"}, "client": {program()},
	}.Encode()
	type answer struct {
		code string
		err  error
	}
	answers := make(chan answer, 1)
	srv := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			q := r.URL.Query()
			w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
			w.Header().Set("Referrer-Policy", "no-referrer")
			if r.URL.Path != "/done" || r.Host != l.Addr().String() || subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(state)) != 1 {
				http.Error(w, "this is not the answer that sallyway login waits for", http.StatusForbidden) // and waits on
				return
			}
			got := answer{code: q.Get("code")}
			title := "Logged in"
			switch {
			case q.Get("iss") != "" && strings.TrimSuffix(q.Get("iss"), "/") != strings.TrimSuffix(c.URL(), "/"):
				got = answer{err: daemon.Failf("log in: the answer is of %s, not of %s\nlog in with the URL that the platform has for itself", printable(q.Get("iss")), c.URL())}
			case q.Get("error") != "" || got.code == "":
				got = answer{err: daemon.Failf("log in: it was denied in the browser (%s)", printable(q.Get("error")))}
			}
			if got.err != nil {
				title = "Not logged in"
			}
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprintf(w, answerPage, title)
			select {
			case answers <- got:
			default: // a second answer counts for nothing
			}
		}),
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(l) // ends with Shutdown; what fails before shows as a wait that ends
	}()
	defer func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if srv.Shutdown(stop) != nil {
			_ = srv.Close()
		}
		<-served
	}()
	fmt.Fprintf(w, "Log in with the browser that opens. If none does, open this on this host:\n\n    %s\n\nWithout a browser here: sallyway login --device\n", to)
	a.openBrowser(ctx, to)
	wait, cancel := context.WithTimeout(ctx, browserWait)
	defer cancel()
	select {
	case <-wait.Done():
		if ctx.Err() != nil {
			return t, ctx.Err()
		}
		return t, daemon.Failf("log in: the browser brought no answer\nrun sallyway login again, or with --device")
	case got := <-answers:
		if got.err != nil {
			return t, got.err
		}
		return c.TakeLoginToken(ctx, control.TakeToken{Grant: control.GrantCode, Code: got.code, Verifier: verifier, Redirect: redirect})
	}
}

// openBrowser opens a page, where there is something to open it with; otherwise the person opens it.
func (a *app) openBrowser(ctx context.Context, page string) {
	if a.browse != nil {
		a.browse(page)
		return
	}
	tool := "xdg-open"
	if runtime.GOOS == "darwin" {
		tool = "open"
	}
	if !canBrowse() {
		return
	}
	// The page's address holds nothing secret: a challenge and a state that are worth nothing without this process.
	cmd := exec.CommandContext(ctx, tool, page) //nolint:gosec // a fixed program, and a URL that begins with the platform's own
	if cmd.Start() == nil {
		go func() { _ = cmd.Wait() }() // it tells nothing that helps
	}
}
