package webhook

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/version"
	"sallyway/platform/registry"
	"sallyway/platform/store"
)

// Pacing and limits of deliveries.
const (
	dueEvery     = time.Second
	workers      = 32 // webhooks that are delivered at once
	workersOfOrg = 4
	atOnce       = 200 // entries that are read at once
	turn         = 20 * time.Second
	tryTimeout   = 10 * time.Second // of one request
	dialTimeout  = 5 * time.Second
	firstWait    = 5 * time.Second // after the first failure; it doubles
	mostWait     = 10 * time.Minute
	saveEvery    = time.Second
	answerMost   = 4 << 10  // bytes that are read of an answer: nothing is done with them
	headerMost   = 16 << 10 // bytes
)

// event is the body of a delivery.
type event struct {
	Type         string    `json:"type"` // the action
	Timestamp    time.Time `json:"timestamp"`
	Organization string    `json:"organization"`
	Data         eventData `json:"data"`
}

// eventData is the audit entry. Detail is as it was hashed.
type eventData struct {
	Seq    int64           `json:"seq,omitempty"`
	Actor  string          `json:"actor"`
	Action string          `json:"action"`
	Object string          `json:"object"`
	Result string          `json:"result"`
	Detail json.RawMessage `json:"detail"`
	Hash   string          `json:"hash,omitempty"`
}

// Run delivers until ctx ends, and returns after the last request has.
func (s *Service) Run(ctx context.Context) error {
	t := time.NewTicker(s.cfg.every)
	defer t.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	failing := false
	for {
		if s.cfg.Leads() {
			err := s.start(ctx, &wg)
			if err != nil && !failing && ctx.Err() == nil {
				s.cfg.Log.Warn("webhooks wait", "error", err)
			}
			failing = err != nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// start gives every webhook that is due a worker, as far as there are some: one that does not answer holds up nobody but itself.
func (s *Service) start(ctx context.Context, wg *sync.WaitGroup) error {
	var due []*store.Webhook
	if err := s.reg.Store.View(ctx, func(tx store.Tx) (err error) {
		due, err = tx.DueWebhooks(ctx, s.reg.Now(), 4*workers)
		return err
	}); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, w := range due {
		ofOrg := 0
		for _, org := range s.running {
			if org == w.Org {
				ofOrg++
			}
		}
		if len(s.running) >= workers || ofOrg >= workersOfOrg || s.running[w.ID] != "" {
			continue
		}
		s.running[w.ID] = w.Org
		wg.Go(func() {
			defer func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				delete(s.running, w.ID)
			}()
			if err := s.deliver(ctx, w); err != nil && ctx.Err() == nil {
				s.cfg.Log.Warn("the state of a webhook is not written down: it goes on from where it was", "org", w.Org, "webhook", w.Name, "error", err)
			}
		})
	}
	return nil
}

// deliver sends what waits, until there is nothing, something fails, or the webhook's turn is over. The error is the store's.
func (s *Service) deliver(ctx context.Context, w *store.Webhook) error {
	r, err := s.receiver(w)
	if err != nil {
		return s.failed(ctx, w, err)
	}
	defer r.close()
	began, saved := time.Now(), time.Now()
	for ctx.Err() == nil && time.Since(began) < turn && s.cfg.Leads() {
		var es []*store.AuditEntry
		if err := s.reg.Store.View(ctx, func(tx store.Tx) (err error) {
			es, err = tx.Audit(ctx, w.Org, w.Cursor, atOnce)
			return err
		}); err != nil {
			return err
		}
		for _, e := range es {
			if matches(w.Events, e.Action) {
				_, err := r.send(ctx, w.ID+"-"+strconv.FormatInt(e.Seq, 10), event{
					Type: e.Action, Timestamp: e.At.UTC(), Organization: w.Org,
					Data: eventData{Seq: e.Seq, Actor: e.Actor, Action: e.Action, Object: e.Object, Result: e.Result, Detail: e.Detail, Hash: e.Hash},
				})
				if err != nil && ctx.Err() != nil {
					break // the platform stops: that is no failure of the receiver
				}
				s.count(err)
				if err != nil {
					return s.failed(ctx, w, err)
				}
				w.Success = s.reg.Now().UTC()
			}
			w.Cursor, w.Failed, w.Tries, w.Problem, w.Next = e.Seq, time.Time{}, 0, "", s.reg.Now()
			if time.Since(saved) >= saveEvery {
				if gone, err := s.save(ctx, w); gone || err != nil {
					return err
				}
				saved = time.Now()
			}
		}
		if gone, err := s.save(context.WithoutCancel(ctx), w); gone || err != nil || len(es) < atOnce {
			return err
		}
	}
	return nil
}

// save writes down how far it got; gone says that it was deleted, disabled or moved on meanwhile.
func (s *Service) save(ctx context.Context, w *store.Webhook) (gone bool, err error) {
	err = s.reg.Store.Update(ctx, func(tx store.Tx) error { return tx.PutWebhookState(ctx, w) })
	if errors.Is(err, store.ErrNotFound) {
		return true, nil
	}
	return false, err
}

// failed notes a failure, and when it is tried again.
func (s *Service) failed(ctx context.Context, w *store.Webhook, cause error) error {
	now := s.reg.Now().UTC()
	if w.Failed.IsZero() {
		w.Failed = now
		s.cfg.Log.Info("a webhook is not delivered, it is tried again", "org", w.Org, "webhook", w.Name, "error", problem(cause))
	}
	w.Tries++
	w.Problem = problem(cause)
	w.Next = now.Add(s.wait(w.Tries))
	if !errors.Is(cause, errGone) {
		_, err := s.save(ctx, w)
		return err
	}
	return s.reg.Transact(registry.WithActor(ctx, "platform"), func(c *registry.Change) error {
		now, err := c.FindWebhook(ctx, w.Org, w.ID)
		if errors.Is(err, store.ErrNotFound) || err == nil && now.Disabled != "" {
			return nil
		}
		if err != nil {
			return err
		}
		now.Cursor, now.Success, now.Disabled = max(now.Cursor, w.Cursor), w.Success, errGone.Error()
		if err := c.UpdateWebhook(ctx, now); err != nil {
			return err
		}
		return c.Record(ctx, w.Org, "webhook.disable", "webhook/"+w.ID, map[string]any{"name": w.Name, "reason": errGone.Error()})
	})
}

// wait is how long to wait after so many failures: twice as long each time, and a quarter more or less, so that receivers which came back are not
// called by all at once.
func (s *Service) wait(tries int) time.Duration {
	d := min(mostWait, s.cfg.first<<min(tries-1, 16))
	return d + time.Duration((rand.Float64()-0.5)/2*float64(d))
}

// receiver sends to one webhook.
type receiver struct {
	s      *Service
	w      *store.Webhook
	key    []byte
	client *http.Client
}

func (s *Service) receiver(w *store.Webhook) (*receiver, error) {
	secret, err := s.reg.Seal.Open(registry.WebhookLabel(w.ID), w.Secret)
	if err != nil {
		return nil, err
	}
	r := &receiver{s: s, w: w}
	if r.key, err = key(string(secret)); err != nil {
		return nil, err
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if s.cfg.tls != nil {
		conf = s.cfg.tls.Clone()
		conf.MinVersion = tls.VersionTLS12
	}
	r.client = &http.Client{
		Timeout: tryTimeout,
		Transport: &http.Transport{
			DialContext: r.dial, TLSClientConfig: conf, TLSHandshakeTimeout: tryTimeout, MaxResponseHeaderBytes: headerMost, MaxConnsPerHost: 1, IdleConnTimeout: time.Minute,
			ForceAttemptHTTP2: true,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return r, nil
}

func (r *receiver) close() { r.client.CloseIdleConnections() }

// dial connects to the receiver: by the organization's gateways, or to the public addresses that its name has.
func (r *receiver) dial(ctx context.Context, network, hostport string) (net.Conn, error) {
	if r.w.Gateways {
		if r.s.cfg.Through == nil {
			return nil, errors.New("this platform has no way through gateways")
		}
		return r.s.cfg.Through(ctx, r.w.Org, hostport)
	}
	host, port, err := net.SplitHostPort(hostport)
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	if a, err := netip.ParseAddr(host); err == nil {
		addrs = []netip.Addr{a}
	} else if addrs, err = r.s.cfg.Resolve(ctx, host); err != nil {
		return nil, unnamed(host, err)
	}
	d := net.Dialer{Timeout: dialTimeout}
	err = fmt.Errorf("%s has no address", host)
	for _, a := range addrs {
		if !r.s.cfg.public(a) {
			// Not which: what only the platform's network knows of names is not for organizations to ask for.
			err = fmt.Errorf("%s is not a public address: the platform reaches such only through gateways (--through-gateways)", host)
			continue
		}
		// The address that was looked at is the one that is dialled: a name that answers otherwise the next time changes nothing.
		var c net.Conn
		if c, err = d.DialContext(ctx, network, net.JoinHostPort(a.String(), port)); err == nil {
			return c, nil
		}
	}
	return nil, err
}

// unnamed says why a name has no address, without naming the platform's resolver.
func unnamed(host string, err error) error {
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns) && dns.IsNotFound:
		return fmt.Errorf("%s has no address: no such host", host)
	case errors.As(err, &dns) && dns.IsTimeout:
		return fmt.Errorf("%s has no address: the name servers do not answer", host)
	}
	return fmt.Errorf("%s has no address that the platform could find", host)
}

// Sign makes the value of the header webhook-signature.
func Sign(key []byte, id, timestamp string, body []byte) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(id + "." + timestamp + "."))
	mac.Write(body)
	return "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// send makes one request. Nothing of the answer but its status is told to anybody.
func (r *receiver) send(ctx context.Context, id string, e event) (status int, err error) {
	body, err := json.Marshal(e)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.w.URL, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	at := strconv.FormatInt(time.Now().Unix(), 10)
	h := req.Header
	h.Set("Content-Type", "application/json")
	h.Set("User-Agent", "sallyway-platform/"+version.Get().Version)
	h.Set("webhook-id", id)
	h.Set("webhook-timestamp", at)
	h.Set("webhook-signature", Sign(r.key, id, at, body))
	resp, err := r.client.Do(req)
	if err != nil {
		return 0, err
	}
	_, _ = io.CopyN(io.Discard, resp.Body, answerMost) // so that the connection can be used again; a longer answer ends it
	_ = resp.Body.Close()
	switch {
	case httpStatus(resp.StatusCode):
		return resp.StatusCode, nil
	case resp.StatusCode == http.StatusGone:
		return resp.StatusCode, errGone
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		return resp.StatusCode, fmt.Errorf("the receiver answered %d: redirects are not followed, give the URL where it leads", resp.StatusCode)
	}
	return resp.StatusCode, fmt.Errorf("the receiver answered %d", resp.StatusCode)
}

// census counts webhooks by state at every scrape.
type census struct{ s *Service }

var (
	_           prometheus.Collector = (*census)(nil)
	statesDesc                       = prometheus.NewDesc("sallyway_platform_webhooks", "Webhooks by organization and state.", []string{"org", "state"}, nil)
	backlogDesc                      = prometheus.NewDesc("sallyway_platform_webhook_backlog", "Audit entries that the webhook of an organization which is furthest behind has not come to.", []string{"org"}, nil)
)

// Describe implements prometheus.Collector.
func (*census) Describe(ch chan<- *prometheus.Desc) {
	ch <- statesDesc
	ch <- backlogDesc
}

// Collect implements prometheus.Collector.
func (c *census) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	names, err := c.s.reg.OrgNames(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(statesDesc, err)
		return
	}
	for _, org := range names {
		l, err := c.s.List(ctx, org, store.Page{})
		if err != nil || len(l.Items) == 0 {
			continue // an organization that was deleted meanwhile, or has none
		}
		counts := map[string]int{control.WebhookFailing: 0}
		backlog := int64(0)
		for _, w := range l.Items {
			counts[w.State]++
			if w.State != control.WebhookDisabled {
				backlog = max(backlog, w.Backlog)
			}
		}
		for state, n := range counts {
			ch <- prometheus.MustNewConstMetric(statesDesc, prometheus.GaugeValue, float64(n), org, state)
		}
		ch <- prometheus.MustNewConstMetric(backlogDesc, prometheus.GaugeValue, float64(backlog), org)
	}
}
