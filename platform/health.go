package platform

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"
)

// Conditions by name: the database can not be written; the listeners are about to be closed.
const (
	conditionDatabase = "database"
	conditionStop     = "stop"
)

var errStopping = errors.New("the platform stops")

// healthRoutes are for balancers and orchestrators. /readyz, which is /healthz too: does this platform do its work, or should requests go to
// another; 503 with the reasons when not. /livez: does the process answer; nothing that it needs makes this no, since starting anew would not help.
func (s *Server) healthRoutes(mux *http.ServeMux) {
	ready := func(w http.ResponseWriter, _ *http.Request) {
		reasons := s.Conditions()
		status := http.StatusOK
		if len(reasons) > 0 {
			status = http.StatusServiceUnavailable
		}
		answerHealth(w, status, map[string]any{"ready": len(reasons) == 0, "reasons": reasons})
	}
	mux.HandleFunc("GET /readyz", ready)
	mux.HandleFunc("GET /healthz", ready)
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		answerHealth(w, http.StatusOK, map[string]any{"live": true})
	})
}

func answerHealth(w http.ResponseWriter, status int, doc any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(doc) // the peer has gone: nobody is left to tell
}

// drainDelay is how long a platform that stops says that it is not ready before it closes its listeners.
func (s *Server) drainDelay() time.Duration {
	if s.cfg.DrainDelay == 0 && s.cfg.Home().store().Replicated() {
		return replicaDrainDelay
	}
	return s.cfg.DrainDelay
}

// replicaDrainDelay is a little more than the usual second between two of a balancer's questions.
const replicaDrainDelay = 2 * time.Second

// untilDrained returns a context that ends a while after ctx (Config.DrainDelay): from ctx's end on the platform says that it is not ready, and still answers, so that
// a balancer that asks takes it out before its listeners close. The returned function waits until nothing of it runs.
func (s *Server) untilDrained(ctx context.Context) (context.Context, func()) {
	serving, cut := context.WithCancelCause(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-ctx.Done():
		case <-serving.Done():
			return
		}
		s.mu.Lock()
		s.bad[conditionStop] = errStopping
		s.mu.Unlock()
		if s.cfg.Health != nil {
			s.cfg.Health(conditionStop, errStopping)
		}
		if delay := s.drainDelay(); delay > 0 {
			t := time.NewTimer(delay)
			defer t.Stop()
			select {
			case <-t.C:
			case <-serving.Done():
			}
		}
		cut(context.Cause(ctx))
	}()
	return serving, func() { cut(nil); <-done }
}
