package appliance

import (
	"context"

	"sallyway/internal/appliance/config"
)

// askCloud asks the cloud's metadata service for a configuration.
func (s *service) askCloud(ctx context.Context) {
	f := config.Metadata(ctx)
	r := config.Choose([]config.Found{f})
	for _, t := range r.Notes {
		s.note(t)
	}
	for _, err := range r.Errs {
		s.note("a configuration is wrong and is passed over: " + err.Error())
	}
	if r.Config == nil {
		return
	}
	if !r.Config.Network.IsZero() {
		s.note("metadata: network: is not obeyed, since the metadata came by the network as it is")
		r.Config.Network = config.Network{Proxy: r.Config.Network.Proxy}
	}
	s.result = r
	if err := s.net.SetPorts(openPorts(r.Config)); err != nil {
		s.note(err.Error())
	}
}
