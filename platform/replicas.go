package platform

import (
	"time"

	"sallyway/platform/api"
	"sallyway/platform/push"
	"sallyway/platform/replica"
)

// local is what other platforms on the same database tell: the hub's part, and refused requests.
type local struct {
	*push.Hub
	limiter *api.Limiter
	now     func() time.Time
}

var _ replica.Local = local{}

// RemoteRefused implements replica.Local.
func (l local) RemoteRefused(source string) { l.limiter.Failed(source, l.now()) }

// listens is where this platform listens, for those who look at several.
func (s *Server) listens() string {
	if s.https != nil {
		return s.https.Addr().String()
	}
	return s.plain.Addr().String()
}

// Replicas is what is known of the platforms on the same database; nil on SQLite, which none shares.
func (s *Server) Replicas() *replica.Status {
	if s.group == nil {
		return nil
	}
	st := s.group.Status()
	return &st
}
