package daemon

import (
	"encoding/json"
	"maps"
	"net/http"
	"sync"
)

// Health gathers what a daemon knows about itself. Each named condition is good or carries a reason; the daemon is
// ready when it has said so and every condition is good. The zero value is usable and not ready; all methods may be
// called concurrently.
type Health struct {
	mu      sync.Mutex
	started bool             // guarded by mu
	bad     map[string]error // conditions that are not good; guarded by mu
}

// Set records a condition: nil means good.
func (h *Health) Set(condition string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil {
		delete(h.bad, condition)
		return
	}
	if h.bad == nil {
		h.bad = make(map[string]error)
	}
	h.bad[condition] = err
}

func (h *Health) setStarted(yes bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.started = yes
}

// Readiness is what /readyz answers.
type Readiness struct {
	Ready   bool              `json:"ready"`
	Reasons map[string]string `json:"reasons,omitempty"` // condition → why it is not good
}

// Readiness returns the present state.
func (h *Health) Readiness() Readiness {
	h.mu.Lock()
	defer h.mu.Unlock()
	reasons := make(map[string]string)
	if !h.started {
		reasons["start"] = "starting or stopping"
	}
	for c, err := range maps.All(h.bad) {
		reasons[c] = err.Error()
	}
	return Readiness{Ready: len(reasons) == 0, Reasons: reasons}
}

// healthRoutes adds /readyz (does it do its work), /healthz, which is the same under the name that balancers ask for, and /livez (does the process
// work: nothing outside of it makes this no, so that what it needs being away is no reason to start it anew).
func healthRoutes(mux *http.ServeMux, h *Health, alive func() error) {
	mux.Handle("GET /readyz", h)
	mux.Handle("GET /healthz", h)
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		if err := alive(); err != nil {
			writeJSON(w, http.StatusServiceUnavailable, Liveness{Reason: err.Error()})
			return
		}
		writeJSON(w, http.StatusOK, Liveness{Live: true})
	})
}

// Liveness is what /livez answers.
type Liveness struct {
	Live   bool   `json:"live"`
	Reason string `json:"reason,omitempty"` // why it does not work
}

// ServeHTTP is /readyz: 200 when ready, else 503; the body says why.
func (h *Health) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	r := h.Readiness()
	code := http.StatusOK
	if !r.Ready {
		code = http.StatusServiceUnavailable
	}
	writeJSON(w, code, r)
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		http.Error(w, "encode answer: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_, _ = w.Write(append(b, '\n')) // the peer has gone: nobody is left to tell
}
