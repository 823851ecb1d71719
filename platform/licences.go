package platform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/entitlement"
	"sallyway/internal/version"
	"sallyway/platform/registry"
)

// How often licences are looked at.
const (
	licenceLook  = time.Hour // for warnings, and for a file that was replaced
	licenceFetch = 24 * time.Hour
	licenceSoon  = time.Minute // after the start, at most
	// maxLicenceFile bounds a file with licences, one on each line, in bytes.
	maxLicenceFile = 4 << 20
)

// LicenceConfig says whose licences count and where they come from. The zero value is a platform without any: nothing is limited.
type LicenceConfig struct {
	// Trust are keys of issuers (ed25519:…), or files with one on each line. Without any no licence can be installed.
	Trust []string
	// File has a licence on each line, each for the organization that it names. It is looked at again when it was replaced.
	File string
	// URL is that of a licence service that is asked once a day for what is new, Key the licence key for it: secret. Pin is the key hash of the CA of
	// its certificate; empty: the system's roots vouch.
	URL, Key, Pin string
}

// licences brings licences in and watches over them.
type licences struct {
	cfg  LicenceConfig
	s    *Server
	link *link.Link // nil: no service
	// file is when the file was last changed of those that were read.
	file   time.Time
	asked  *prometheus.CounterVec
	answer prometheus.Gauge
}

// open checks the configuration and reads what it names. The link is nil without a service.
func (c *LicenceConfig) open(now func() time.Time) (entitlement.Trust, *link.Link, error) {
	trust, err := entitlement.ParseTrust(c.Trust)
	if err != nil {
		return nil, nil, err
	}
	if len(trust) == 0 && (c.File != "" || c.URL != "") {
		return nil, nil, errors.New("licences are to be used, and no issuer is trusted: name its key with --licence-trust, as `sallyway-license admin keys` prints it")
	}
	if c.File != "" {
		if _, err := os.Stat(c.File); err != nil {
			return nil, nil, fmt.Errorf("licence file: %w", err)
		}
	}
	if c.URL == "" {
		return trust, nil, nil
	}
	if c.Key == "" {
		return nil, nil, errors.New("a licence service is named and no licence key for it: give its file with --licence-key-file")
	}
	way, err := link.New(link.Config{URL: c.URL, Pin: c.Pin, UserAgent: "platformd/" + version.Get().Version, Now: now})
	if err != nil {
		return nil, nil, fmt.Errorf("licence service: %w", err)
	}
	if way.Plain() {
		return nil, nil, fmt.Errorf("licence service %s: the licence key would go over the network unprotected: use https", c.URL)
	}
	return trust, way, nil
}

func newLicences(ctx context.Context, s *Server) (*licences, error) {
	trust, way, err := s.cfg.Licence.open(s.cfg.Now)
	if err != nil {
		return nil, err
	}
	s.reg.LicenceTrust = trust
	if _, err := s.reg.Installation(ctx); err != nil {
		return nil, err
	}
	l := &licences{cfg: s.cfg.Licence, s: s, link: way, asked: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sallyway_platform_licence_fetches_total", Help: "Looks for licences at the licence service, by result.",
	}, []string{"result"}), answer: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "sallyway_platform_licence_fetched_timestamp_seconds", Help: "When the licence service last answered; 0 is never.",
	})}
	s.cfg.Metrics.MustRegister(l.asked, l.answer, &licenceCensus{s})
	return l, nil
}

// run looks at the file, asks the service and warns of ends until ctx ends. Nothing of it stops the platform.
func (l *licences) run(ctx context.Context) {
	look := time.NewTicker(licenceLook)
	defer look.Stop()
	ask := time.NewTimer(rand.N(licenceSoon))
	defer ask.Stop()
	l.look(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			l.look(ctx)
		case <-ask.C:
			next := licenceFetch - licenceLook + rand.N(2*licenceLook)
			if err := l.fetch(ctx); err != nil && ctx.Err() == nil {
				l.s.cfg.Log.Warn("the licence service does not help; the licences that are here stay in force", "url", l.cfg.URL, "error", err)
				next = licenceLook/2 + rand.N(licenceLook)
			}
			ask.Reset(next)
		}
	}
}

// look reads the file when it was replaced, and warns of ends.
func (l *licences) look(ctx context.Context) {
	if err := l.read(ctx); err != nil && ctx.Err() == nil {
		l.s.cfg.Log.Warn("licence file", "file", l.cfg.File, "error", err)
	}
	if err := l.s.reg.WarnLicences(ctx); err != nil && ctx.Err() == nil {
		l.s.cfg.Log.Warn("licences were not looked at", "error", err)
	}
}

func (l *licences) read(ctx context.Context) error {
	if l.cfg.File == "" {
		return nil
	}
	f, err := os.Open(l.cfg.File)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.ModTime().Equal(l.file) {
		return err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxLicenceFile))
	if err != nil {
		return err
	}
	l.file = st.ModTime()
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			err = errors.Join(err, l.install(ctx, line, "file "+l.cfg.File))
		}
	}
	return err
}

// install puts a licence where it says that it belongs.
func (l *licences) install(ctx context.Context, jws, source string) error {
	e, err := l.s.reg.LicenceTrust.Open(jws)
	if err != nil {
		return err
	}
	_, err = l.s.reg.TakeLicence(registry.WithActor(ctx, "platform"), e.Organization, control.InstallLicence{Licence: jws, Source: source})
	if registry.Code(err) == control.CodeConflict { // a newer one is here
		l.s.cfg.Log.Debug("licence left out", "org", e.Organization, "licence", e.ID, "error", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("licence %s for organization %s: %w", e.ID, e.Organization, err)
	}
	return nil
}

// fetch asks the service for licences and installs what is new.
func (l *licences) fetch(ctx context.Context) (err error) {
	if l.link == nil {
		return nil
	}
	defer func() {
		result := "ok"
		if err != nil {
			result = "error"
		}
		l.asked.WithLabelValues(result).Inc()
	}()
	id, err := l.s.reg.Installation(ctx)
	if err != nil {
		return err
	}
	var got struct {
		Licences []string `json:"licences"`
	}
	if err := l.link.Do(ctx, link.Request{
		Method: http.MethodGet, Path: "/api/v1/licence?" + url.Values{"platform": {id}}.Encode(), Bearer: l.cfg.Key,
	}, &got); err != nil {
		return err
	}
	l.answer.Set(float64(l.s.cfg.Now().Unix()))
	for _, jws := range got.Licences {
		err = errors.Join(err, l.install(ctx, jws, "service "+l.cfg.URL))
	}
	return err
}

// FetchLicences asks the licence service now, as the platform does by itself once a day.
func (s *Server) FetchLicences(ctx context.Context) error { return s.licences.fetch(ctx) }

var (
	licenceEndDesc   = prometheus.NewDesc("sallyway_platform_licence_expiry_timestamp_seconds", "When an organization's licence ends.", []string{"org"}, nil)
	licenceValidDesc = prometheus.NewDesc("sallyway_platform_licence_valid", "1 when an organization's licence holds, 0 when nothing can be added because of it.", []string{"org"}, nil)
	licenceUsedDesc  = prometheus.NewDesc("sallyway_platform_licence_used", "How much of what a licence limits there is.", []string{"org", "what"}, nil)
	licenceLimitDesc = prometheus.NewDesc("sallyway_platform_licence_limit", "How much a licence allows; absent where it sets no limit.", []string{"org", "what"}, nil)
)

// licenceCensus tells at every scrape what licences allow. Organizations without one are absent.
type licenceCensus struct{ s *Server }

var _ prometheus.Collector = (*licenceCensus)(nil)

// Describe implements prometheus.Collector.
func (*licenceCensus) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{licenceEndDesc, licenceValidDesc, licenceUsedDesc, licenceLimitDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *licenceCensus) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), censusTimeout)
	defer cancel()
	all, err := c.s.reg.Licences(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(licenceEndDesc, err)
		return
	}
	for org, l := range all {
		valid := 0.0
		if l.State == control.LicenceValid || l.State == control.LicenceExpiring {
			valid = 1
		}
		ch <- prometheus.MustNewConstMetric(licenceValidDesc, prometheus.GaugeValue, valid, org)
		if e := l.Entitlement; e != nil {
			ch <- prometheus.MustNewConstMetric(licenceEndDesc, prometheus.GaugeValue, float64(e.Expires.Unix()), org)
		}
		for _, u := range l.Use {
			ch <- prometheus.MustNewConstMetric(licenceUsedDesc, prometheus.GaugeValue, float64(u.Used), org, u.What)
			if u.Limit != nil {
				ch <- prometheus.MustNewConstMetric(licenceLimitDesc, prometheus.GaugeValue, float64(*u.Limit), org, u.What)
			}
		}
	}
}
