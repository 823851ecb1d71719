package license

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"sallyway/internal/database"
)

// censusTimeout bounds a scrape's look at the database.
const censusTimeout = 5 * time.Second

var (
	entitlementsDesc = prometheus.NewDesc("sallyway_license_entitlements", "Documents that were issued, by state.", []string{"state"}, nil)
	customersDesc    = prometheus.NewDesc("sallyway_license_customers", "Customers.", nil, nil)
)

// census counts what there is at every scrape.
type census struct{ s *Server }

var _ prometheus.Collector = (*census)(nil)

// Describe implements prometheus.Collector.
func (*census) Describe(ch chan<- *prometheus.Desc) {
	ch <- entitlementsDesc
	ch <- customersDesc
}

// Collect implements prometheus.Collector.
func (c *census) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), censusTimeout)
	defer cancel()
	n, err := c.s.Counts(ctx)
	if err != nil {
		ch <- prometheus.NewInvalidMetric(entitlementsDesc, err)
		return
	}
	ch <- prometheus.MustNewConstMetric(customersDesc, prometheus.GaugeValue, float64(n.Customers))
	for state, v := range map[string]int64{Current: n.Current, Revoked: n.Revoked, Replaced: n.Replaced} {
		ch <- prometheus.MustNewConstMetric(entitlementsDesc, prometheus.GaugeValue, float64(v), state)
	}
}

// Counts are how much a service has.
type Counts struct {
	Customers int64 `json:"customers"`
	Current   int64 `json:"current"`
	Revoked   int64 `json:"revoked"`
	Replaced  int64 `json:"replaced"`
}

// Counts counts.
func (s *Service) Counts(ctx context.Context) (n Counts, err error) {
	err = s.db.View(ctx, func(tx *database.Tx) error {
		return tx.Row(ctx, `SELECT (SELECT COUNT(*) FROM customers), (SELECT COUNT(*) FROM entitlements WHERE state = 'current'),
			(SELECT COUNT(*) FROM entitlements WHERE state = 'revoked'), (SELECT COUNT(*) FROM entitlements WHERE state = 'replaced')`).
			Scan(&n.Customers, &n.Current, &n.Revoked, &n.Replaced)
	})
	return n, err
}
