// Package browser looks at the platform's pages as a person does: in a real Chromium, over real TLS, inside of a lab.
//
// Screenshots of every page are kept in the folder SALLYWAY_SCREENSHOTS; without it none are taken.
package browser

import (
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/remote"

	"sallyway/internal/lab"
)

// within is a context of the test with a deadline.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("%s: not done within %v", t.Name(), d))
	t.Cleanup(cancel)
	return ctx
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newLab makes a lab that ends with the test.
func newLab(t *testing.T) *lab.Lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("network namespaces need root")
	}
	l, err := lab.New(lab.Config{})
	check(t, err)
	t.Cleanup(l.Close)
	return l
}

// browser is a Chromium with one tab. It lives in a namespace of the lab, so that it reaches nothing but the lab.
type browser struct {
	t     *testing.T
	ctx   context.Context // of the tab
	base  string          // URL of the platform
	shots string
	bad   func() []string // what the page complained of, since the last call
}

// flags keep a Chromium from doing anything that it was not asked for.
var flags = []string{
	"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check", "--disable-background-networking",
	"--disable-component-update", "--disable-sync", "--disable-default-apps", "--disable-extensions", "--metrics-recording-only", "--disable-breakpad",
	"--disable-dev-shm-usage", "--disable-features=Translate,MediaRouter,OptimizationHints,DialMediaRouteProvider", "--ignore-certificate-errors",
	"--force-color-profile=srgb", "--font-render-hinting=none", "--hide-scrollbars", "--mute-audio", "--password-store=basic",
	"--remote-debugging-port=0", "--remote-allow-origins=*", "--window-size=1280,900",
}

// start starts a browser on a host of the lab.
func start(t *testing.T, h *lab.Host, base string) *browser {
	t.Helper()
	path, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatalf("%v: build/prerequisites.sh installs it", err)
	}
	// An address that comes up is a change of the network, at which Chromium gives up what it was loading: IPv6 takes a second to find out
	// that nobody else has an address (RFC 4862 §5.4).
	settled := within(t, time.Minute)
	check(t, lab.Until(settled, 50*time.Millisecond, func() error {
		r, err := h.Run(settled, "ip", "-6", "addr", "show", "tentative")
		if err == nil && strings.TrimSpace(r.Stdout) != "" {
			err = errors.New("addresses are still tentative")
		}
		return err
	}))
	data := h.Path("chromium")
	args := append(append([]string{path}, flags...), "--user-data-dir="+data, "about:blank")
	p, err := h.Start(lab.Spec{Name: "chromium", Args: args, Env: []string{"HOME=" + h.Path("home")}, Grace: 2 * time.Second})
	check(t, err)
	line, err := p.Log.Wait(within(t, time.Minute), 0, `DevTools listening on ws://`)
	if err != nil {
		t.Fatalf("%v\n%s", err, p.Log.Tail(20))
	}
	_, ws, _ := strings.Cut(line.Text, "listening on ")
	u, err := url.Parse(strings.TrimSpace(ws))
	check(t, err)
	u.Host = forward(t, h, u.Host)
	alloc, cancelAlloc := remote.NewAllocator(context.Background(), u.String(), remote.NoModifyURL)
	ctx, cancel := chromedp.NewContext(alloc)
	t.Cleanup(func() { cancel(); cancelAlloc() })
	b := &browser{t: t, ctx: ctx, base: base, shots: os.Getenv("SALLYWAY_SCREENSHOTS")}
	if b.shots != "" {
		check(t, os.MkdirAll(b.shots, 0o755))
	}
	complaints := make(chan string, 1000)
	check(t, chromedp.Listen(ctx, func(ev any) {
		if text := complaint(ev, base); text != "" {
			select {
			case complaints <- text:
			default: // a thousand say enough
			}
		}
	}))
	b.bad = func() (out []string) {
		for {
			select {
			case c := <-complaints:
				out = append(out, c)
			default:
				return out
			}
		}
	}
	for _, enable := range []func() error{
		func() error { _, err := chromedp.Call(ctx, network.Enable, network.EnableParams{}); return err },
		func() error { _, err := chromedp.Call(ctx, cdplog.Enable, cdp.Empty{}); return err },
		func() error { _, err := chromedp.Call(ctx, runtime.Enable, cdp.Empty{}); return err },
	} {
		check(t, enable())
	}
	return b
}

// complaint is what a page that is in order never does: throw, break its own security policy, fetch from elsewhere.
func complaint(ev any, base string) string {
	switch ev := ev.(type) {
	case *runtime.EventExceptionThrown:
		text := "exception: " + ev.ExceptionDetails.Text
		if x := ev.ExceptionDetails.Exception; x != nil {
			text += " " + x.Description
		}
		return text
	case *cdplog.EventEntryAdded:
		// The answer of a page that says no is no fault of the page.
		if ev.Entry.Level == cdplog.EntryLevelError && !strings.Contains(ev.Entry.Text, "the server responded with a status of") {
			return "console: " + ev.Entry.Text
		}
	case *network.EventRequestWillBeSent:
		for _, own := range []string{base, "data:", "about:", "blob:"} {
			if strings.HasPrefix(ev.Request.URL, own) {
				return ""
			}
		}
		return "a request to elsewhere: " + ev.Request.URL
	}
	return ""
}

// forward carries connections from this process's loopback to one in the host's namespace.
func forward(t *testing.T, h *lab.Host, addr string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				d, err := h.Dial(context.Background(), "tcp", addr)
				if err != nil {
					return
				}
				defer d.Close()
				go func() { _, _ = io.Copy(d, c); _ = d.Close() }()
				_, _ = io.Copy(c, d)
			}()
		}
	}()
	return l.Addr().String()
}

// js evaluates an expression in the page.
func js[T any](b *browser, expression string) (T, error) {
	ctx, cancel := context.WithTimeout(b.ctx, step)
	defer cancel()
	return chromedp.Run(ctx, chromedp.Evaluate[T](expression))
}

// eval is js that must work.
func eval[T any](b *browser, expression string) T {
	b.t.Helper()
	v, err := js[T](b, expression)
	if err != nil {
		b.fail(err)
	}
	return v
}

// until waits until an expression is true. A page that goes away meanwhile is looked at again.
func (b *browser) until(d time.Duration, what, expression string) {
	b.t.Helper()
	var last error
	for end := time.Now().Add(d); time.Now().Before(end); {
		ok, err := js[bool](b, "!!("+expression+")")
		if err == nil && ok {
			return
		}
		last = err
		select {
		case <-b.t.Context().Done():
			b.fail(b.t.Context().Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
	b.fail(fmt.Errorf("not within %v: %s (%w)", d, what, cmp.Or(last, errNotYet)))
}

// fail ends the test with what the page looks like.
func (b *browser) fail(err error) {
	b.t.Helper()
	text, _ := js[string](b, "document.body.innerText") // the error counts, these help
	at, _ := js[string](b, "location.href")
	b.shoot("failed-" + strings.ReplaceAll(b.t.Name(), "/", "-"))
	b.t.Fatalf("%v\nat %s\n%s", err, at, text)
}

// open goes to a path.
func (b *browser) open(path string) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, step)
	defer cancel()
	if err := chromedp.Do(ctx, chromedp.Navigate(b.base+path)); err != nil {
		b.fail(err)
	}
}

// click presses a button or follows a link by its text, once there is such a one.
func (b *browser) click(text string) {
	b.t.Helper()
	b.until(step, "something to press that says "+text, `(() => {
		const want = `+quote(text)+`;
		const own = (e) => [...e.childNodes].map((n) => n.classList?.contains("sr") ? "" : n.textContent).join("").trim();
		const e = [...document.querySelectorAll("main a, main button, main summary")].find((e) => e.checkVisibility() && own(e) === want);
		e?.click();
		return e;
	})()`)
}

// turn is click where another page follows.
func (b *browser) turn(text string) {
	b.t.Helper()
	eval[bool](b, `window.here = true`)
	b.click(text)
	b.until(step, "another page", `window.here === undefined && document.readyState === "complete"`)
}

// fill types into a field by its label, or chooses.
func (b *browser) fill(label, value string) {
	b.t.Helper()
	b.until(step, "a field "+label+" that takes "+value, `(() => {
		const l = [...document.querySelectorAll("label")].find((l) => l.textContent.trim() === `+quote(label)+`);
		const f = l?.control, value = `+quote(value)+`;
		if (!f) return false;
		const o = f.tagName === "SELECT" ? [...f.options].find((o) => o.textContent.trim() === value || o.value === value) : { value };
		if (!o) return false;
		f.value = o.value;
		return true;
	})()`)
}

// tick chooses a box by the beginning of its label.
func (b *browser) tick(label string) {
	b.t.Helper()
	b.until(step, "a box "+label, `(() => {
		const l = [...document.querySelectorAll("label")].find((l) => l.textContent.trim().startsWith(`+quote(label)+`));
		if (!l?.control) return false;
		return l.control.checked = true;
	})()`)
}

// sees waits until the content says something. Nothing is touched: the page changes by itself.
func (b *browser) sees(d time.Duration, text string) {
	b.t.Helper()
	b.until(d, "the page says "+text, `document.querySelector("main")?.innerText.includes(`+quote(text)+`)`)
}

// text is the text of an element.
func (b *browser) text(selector string) string {
	b.t.Helper()
	return strings.TrimSpace(eval[string](b, `document.querySelector(`+quote(selector)+`)?.textContent || ""`))
}

// step is how long a page may take to do what it is waited for; a loaded machine is slow.
const step = 30 * time.Second

// look is how a page is looked at.
type look struct {
	name          string
	width, height int64
	dark, phone   bool
}

var (
	light = look{name: "light", width: 1280, height: 900}
	dark  = look{name: "dark", width: 1280, height: 900, dark: true}
	phone = look{name: "phone", width: 390, height: 844, phone: true}
)

// as has the browser look like another one.
func (b *browser) as(l look) {
	b.t.Helper()
	scheme := "light"
	if l.dark {
		scheme = "dark"
	}
	ctx, cancel := context.WithTimeout(b.ctx, step)
	defer cancel()
	_, err := chromedp.Call(ctx, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{Width: l.width, Height: l.height, DeviceScaleFactor: 1, Mobile: l.phone})
	check(b.t, err)
	_, err = chromedp.Call(ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{
		{Name: "prefers-color-scheme", Value: scheme}, {Name: "prefers-reduced-motion", Value: "reduce"},
	}})
	check(b.t, err)
}

// shoot keeps a picture of the whole page, where somebody wants to have it.
func (b *browser) shoot(name string) {
	b.t.Helper()
	if b.shots == "" {
		return
	}
	ctx, cancel := context.WithTimeout(b.ctx, step)
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.FullScreenshot(100))
	if err != nil {
		b.t.Logf("no picture %s: %v", name, err)
		return
	}
	check(b.t, os.WriteFile(filepath.Join(b.shots, name+".png"), png, 0o644))
}

func quote(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(s) + `"`
}

//go:embed accessible.js
var accessible string

// audit holds the page against what everybody must be able to read, hear and reach. where names it.
func (b *browser) audit(where string) {
	b.t.Helper()
	for _, f := range eval[[]string](b, accessible) {
		b.t.Errorf("%s: %s", where, f)
	}
	for _, c := range b.bad() {
		b.t.Errorf("%s: %s", where, c)
	}
}

// errNotYet says that something is waited for.
var errNotYet = errors.New("not yet")
