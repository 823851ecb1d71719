package platform

import (
	"context"

	"sallyway/platform/people"
)

// People are who logs in; for the process's own commands and for tests.
func (s *Server) People() *people.Service { return s.people }

// firstOwner logs where the platform's first person is made, and the code for it. The code is worth nothing once that person exists, so a
// log that is kept gives nothing away; before, it is for whoever can read the platform's log.
func (s *Server) firstOwner(ctx context.Context) error {
	code, err := s.people.SetupCode(ctx)
	if err != nil || code == "" {
		return err
	}
	s.cfg.Log.Info("nobody can log in by browser yet: open the page and make the first owner", "page", s.url+"/setup", "setup_code", code)
	return nil
}
