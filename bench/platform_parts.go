package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptrace"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/identity"
	"sallyway/platform/audit"
	"sallyway/platform/store"
)

// GrantTimes is how long clients that start wait for their configuration with its grants, 200 a second.
type GrantTimes struct {
	Store  string  `json:"store"`
	For    float64 `json:"seconds"`
	Wanted int     `json:"begun"`
	Failed int     `json:"failed"`
	Why    string  `json:"why_failed,omitempty"` // one of them
	// Start is from dialling; Grant from the TLS connection on: an assertion for an access token, which is written to the database, and the
	// control stream up to the end of its first configuration.
	Start Waits `json:"start"`
	Grant Waits `json:"grant"`
	CPU   Spent `json:"cpu_seconds"`
}

// grants measures starts of clients on each database.
func (m *platformMeasure) grants(ctx context.Context) error {
	for _, s := range m.cfg.Stores {
		g, err := m.grantsOn(ctx, s)
		if err != nil {
			return fmt.Errorf("on %s: %w", s, err)
		}
		m.tell("grants on %s: %v ms from dialling, %v from the connection on (p50 / p99 / max); %d of %d failed %s", s, g.Start, g.Grant, g.Failed, g.Wanted, g.Why)
		m.res.Grants = append(m.res.Grants, *g)
	}
	return nil
}

func (m *platformMeasure) grantsOn(ctx context.Context, store string) (res *GrantTimes, err error) {
	p, err := m.newPlatform(ctx, store)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	const gateways = 6
	f, err := newFleet(ctx, p, 2, gateways, grantNodes)
	if err != nil {
		return nil, err
	}
	l, err := p.link(nil)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	if err := f.furnish(ctx, l, gateways); err != nil {
		return nil, err
	}
	clients := f.members[gateways:]
	res = &GrantTimes{Store: store, Wanted: int(m.cfg.Grants.Seconds() * grantRate)}
	var mu sync.Mutex
	var starts, grants []time.Duration
	var wg sync.WaitGroup
	begin, before := time.Now(), p.spent()
	for i := 0; i < res.Wanted && ctx.Err() == nil; i++ {
		wait(ctx, time.Until(begin.Add(time.Duration(i)*time.Second/grantRate))) // an open loop: who is slow is not waited for
		n := clients[i%len(clients)]
		wg.Go(func() {
			start, grant, err := n.startOnce(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				res.Failed++
				res.Why = err.Error()
				return
			}
			starts, grants = append(starts, start), append(grants, grant)
		})
	}
	wg.Wait()
	res.For, res.CPU = time.Since(begin).Seconds(), p.spent().minus(before)
	res.Start, res.Grant = sumWaits(starts), sumWaits(grants)
	return res, context.Cause(ctx)
}

// startOnce is a client's start: it returns the time until it has its configuration, from dialling and from the first connection on.
func (n *fleetNode) startOnce(ctx context.Context) (start, grant time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	l, err := n.f.p.link(nil)
	if err != nil {
		return 0, 0, err
	}
	defer l.Close()
	var connected atomic.Pointer[time.Time]
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) {
		now := time.Now()
		connected.CompareAndSwap(nil, &now)
	}})
	fresh := fleetNode{f: n.f, id: n.id, sign: n.sign, link: l}
	began := time.Now()
	bearer, err := fresh.token(ctx)
	if err != nil {
		return 0, 0, err
	}
	body, err := l.Stream(ctx, link.Request{Method: http.MethodGet, Path: "/api/v1/node/control", Bearer: bearer})
	if err != nil {
		return 0, 0, err
	}
	defer body.Close()
	line, err := bufio.NewReaderSize(body, 16<<10).ReadBytes('\n')
	if err != nil {
		return 0, 0, err
	}
	end := time.Now()
	if configVersion(line) == 0 || !bytes.Contains(line, []byte(`"grant":"ey`)) {
		return 0, 0, fmt.Errorf("no grant in %.200s", line)
	}
	return end.Sub(began), end.Sub(*connected.Load()), nil
}

// AuditRate is how many entries a second go into one organization's chain.
type AuditRate struct {
	Store   string  `json:"store"`
	Callers int     `json:"callers"` // each waits for its entry's transaction before the next
	For     float64 `json:"seconds"`
	Entries int64   `json:"entries"`
	Rate    float64 `json:"entries_per_second"`
}

// audit appends entries in this process: it is the platform's own code on the platform's own store, and the disk is waited for at every commit.
func (m *platformMeasure) audit(ctx context.Context) error {
	for _, s := range m.cfg.Stores {
		r, err := m.auditOn(ctx, s)
		if err != nil {
			return fmt.Errorf("on %s: %w", s, err)
		}
		m.tell("audit on %s: %.0f entries a second by %d callers", s, r.Rate, r.Callers)
		m.res.Audit = append(m.res.Audit, *r)
	}
	return nil
}

func (m *platformMeasure) auditOn(ctx context.Context, on string) (res *AuditRate, err error) {
	url, err := m.hold.database(on)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "bench-audit-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	st, err := store.Open(ctx, store.Config{URL: url, Path: filepath.Join(dir, "platform.db")})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	const org = "default"
	res = &AuditRate{Store: on, Callers: auditCaller}
	var done atomic.Int64
	var mu sync.Mutex
	var failed error
	begin := time.Now()
	var wg sync.WaitGroup
	for i := range auditCaller {
		wg.Go(func() {
			for n := 0; time.Since(begin) < m.cfg.Audit && ctx.Err() == nil; n++ {
				err := st.Update(ctx, func(tx store.Tx) error {
					return audit.Append(ctx, tx, org, time.Now(), audit.Entry{
						Actor: fmt.Sprintf("node:default/client/c-%d", i), Action: "certificate.issue", Object: fmt.Sprintf("default/client/c-%d-%d", i, n), Result: audit.OK,
						Detail: map[string]any{"key": "0123456789abcdef0123456789abcdef", "not_after": "2026-01-01T00:00:00Z"},
					})
				})
				if err != nil {
					mu.Lock()
					failed = errors.Join(failed, err)
					mu.Unlock()
					return
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	res.For, res.Entries = time.Since(begin).Seconds(), done.Load()
	res.Rate = float64(res.Entries) / res.For
	if failed != nil {
		return nil, failed
	}
	v, err := audit.Verify(ctx, st, org)
	if err == nil && (!v.OK || v.Entries != res.Entries) {
		err = fmt.Errorf("the chain has %d good entries of %d: %s", v.Entries, res.Entries, v.Problem)
	}
	return res, err
}

// PageOrganization is whose pages are read.
type PageOrganization struct {
	Store     string `json:"store"`
	Gateways  int    `json:"gateways"`
	Clients   int    `json:"clients"`
	Relays    int    `json:"relays"`
	Resources int    `json:"resources"` // as many policies
	Sessions  int    `json:"sessions"`
}

// PageTime is a page's time over a connection that stands: from the request to the last byte, on the same host.
type PageTime struct {
	Page  string `json:"page"`
	Times Waits  `json:"times"`
	Bytes int    `json:"bytes"`
}

// pageRuns is how often each is read.
const pageRuns = 30

// pages reads pages as a person who is logged in.
func (m *platformMeasure) pages(ctx context.Context) (err error) {
	p, err := m.newPlatform(ctx, m.cfg.Stores[0])
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	of := PageOrganization{Store: m.cfg.Stores[0], Gateways: m.cfg.PageGateways, Clients: 100, Relays: 10}
	m.tell("pages of an organization with %d gateways: making it", of.Gateways)
	f, err := newFleet(ctx, p, of.Relays, of.Gateways, of.Clients)
	if err != nil {
		return err
	}
	gateways, clients := f.members[:of.Gateways], f.members[of.Gateways:]
	for i, g := range gateways { // two sessions each
		g.beat.Sessions = nil
		for j := range 2 {
			c := clients[(i+j)%len(clients)]
			g.beat.Sessions = append(g.beat.Sessions, control.SessionReport{Peer: c.id, Key: identity.HashKey(c.key.Public()), Relay: "relay-001 udp", Since: time.Now().UTC(), Flows: 1})
			of.Sessions++
		}
	}
	if err := p.parallel(ctx, of.Gateways, func(ctx context.Context, l *link.Link, i int) error {
		of := fmt.Sprintf("resource-%d", i)
		return errors.Join(f.resource(ctx, l, of, i), f.allow(ctx, l, "client:"+clients[i%len(clients)].name, of))
	}); err != nil {
		return err
	}
	of.Resources = of.Gateways
	beat := func(ctx context.Context) error {
		return p.parallel(ctx, len(f.all), func(ctx context.Context, l *link.Link, i int) error {
			n := f.all[i]
			n.link = l // nobody else has it: the node's own connections are not needed here
			bearer, err := n.token(ctx)
			if err != nil {
				return err
			}
			return l.Do(ctx, link.Request{Method: http.MethodPost, Path: "/api/v1/node/heartbeat", Bearer: bearer, JSON: n.beat}, nil)
		})
	}
	if err := beat(ctx); err != nil {
		return err
	}
	b, err := p.logIn(ctx)
	if err != nil {
		return err
	}
	defer b.CloseIdleConnections()
	m.res.PagesOf = of
	last := time.Now()
	for _, page := range []string{
		"overview", "networking/relays", "networking/relays/relay-001", "networking/gateways", "networking/gateways?q=999", "networking/gateways/gw-0500", "networking/clients",
		"resources", "resources?q=999", "resources/resource-500", "policies", "policies?q=999", "policies/explain", "policies/explain?subject=client:c-00001&resource=resource-101",
		"groups", "sessions", "topology", "topology?subject=client:c-00001", "history", "certificates", "audit", "audit?q=999", "users", "organization",
	} {
		if time.Since(last) > control.HeartbeatInterval {
			if err := beat(ctx); err != nil {
				return err
			}
			last = time.Now()
		}
		t := PageTime{Page: page}
		var times []time.Duration
		for range pageRuns {
			start := time.Now()
			body, status, err := get(ctx, b, p.cred.URL+"/orgs/default/"+page)
			if err != nil {
				return err
			}
			times = append(times, time.Since(start))
			if status != http.StatusOK {
				return fmt.Errorf("page %s: %d: %.300s", page, status, body)
			}
			t.Bytes = len(body)
		}
		t.Times = sumWaits(times)
		m.res.Pages = append(m.res.Pages, t)
		m.tell("page %s: %v ms (p50 / p99 / max), %d KiB", page, t.Times, t.Bytes>>10)
	}
	return context.Cause(ctx)
}

func get(ctx context.Context, c *http.Client, at string) (body []byte, status int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return nil, 0, err
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	return body, resp.StatusCode, err
}

// logIn makes the platform's first owner, and returns that person's browser.
func (p *controlPlane) logIn(ctx context.Context) (*http.Client, error) {
	jar, err := cookiejar.New(nil)
	if err != nil {
		return nil, err
	}
	tlsConfig, err := p.tls()
	if err != nil {
		return nil, err
	}
	c := &http.Client{Jar: jar, Transport: &http.Transport{TLSClientConfig: tlsConfig, ForceAttemptHTTP2: true, DialContext: (&net.Dialer{}).DialContext}}
	const password = "a long enough passphrase of nobody" //nolint:gosec // of a platform that lives as long as the measurement
	form := url.Values{"code": {p.cred.Token}, "login": {"ada"}, "password": {password}, "password2": {password}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.cred.URL+"/setup", strings.NewReader(form.Encode()))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Sec-Fetch-Site", "same-origin")
	resp, err := c.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || !strings.HasSuffix(resp.Request.URL.Path, "/overview")) {
		err = fmt.Errorf("the first owner lands at %s with %d: %.300s", resp.Request.URL, resp.StatusCode, body)
	}
	return c, err
}
