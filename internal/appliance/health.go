package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"sallyway/internal/appliance/config"
	"sallyway/internal/appliance/machine"
	"sallyway/internal/appliance/supervise"
	"sallyway/internal/daemon"
)

// healthProgram is a process of its own, with a user that may do nothing: it is the one thing of an appliance that answers strangers.
func (s *service) healthProgram(c *config.Config) *running {
	addr, err := c.HealthAddr()
	if err != nil {
		return nil // was checked when the configuration was read
	}
	jail := machine.Jail{UID: healthUID}
	args := []string{jailWord, jail.String(), healthWord, addr.String()}
	for _, p := range of(c.Role) {
		if a := p.healthAddr(c); a != "" {
			args = append(args, a)
		}
	}
	return &running{program{name: healthWord, jail: jail}, supervise.New(supervise.Program{
		Name: healthWord, Path: executable, Args: args, Dir: "/", UID: healthUID, Socket: filepath.Join(runFolder, "notify", healthWord),
		StopTimeout: 5 * time.Second, Log: s.slog,
	})}
}

// healthTimeout bounds a question to one daemon, and healthFresh is how long its answer counts: strangers cannot make us ask more often.
const (
	healthTimeout = 2 * time.Second
	healthFresh   = time.Second
)

// serveHealth answers GET /healthz on args[0]: 200 when every daemon on the other addresses is ready, else 503. It says no more than that.
func serveHealth(args []string) int {
	if len(args) < 2 {
		fmt.Fprintln(os.Stderr, "health: want an address to listen on and those of the daemons")
		return daemon.ExitUsage
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	srv := &http.Server{
		Addr: args[0], Handler: healthHandler(args[1:]), ReadTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, IdleTimeout: 30 * time.Second,
		MaxHeaderBytes: 4 << 10, BaseContext: nil,
	}
	end := context.AfterFunc(ctx, func() { _ = srv.Close() }) // short answers: nothing to wait for
	defer end()
	if err := srv.ListenAndServe(); err != nil && !errors.Is(err, http.ErrServerClosed) {
		fmt.Fprintf(os.Stderr, "health: %v\n", err)
		return daemon.ExitDegraded
	}
	return daemon.ExitOK
}

func healthHandler(daemons []string) http.Handler {
	type answer struct {
		at    time.Time
		ready bool
	}
	latest := make(chan answer, 1) // one question at a time
	latest <- answer{}
	client := &http.Client{Timeout: healthTimeout}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		a := <-latest
		if time.Since(a.at) > healthFresh {
			a = answer{ready: true}
			for _, d := range daemons {
				a.ready = a.ready && answersReady(r.Context(), client, d)
			}
			a.at = time.Now()
		}
		latest <- a
		code := http.StatusOK
		if !a.ready {
			code = http.StatusServiceUnavailable
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]bool{"ready": a.ready}) // the peer has gone
	})
	return mux
}

func answersReady(ctx context.Context, client *http.Client, addr string) bool {
	req, err := http.NewRequestWithContext(context.WithoutCancel(ctx), http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return false
	}
	res, err := client.Do(req)
	if err != nil {
		return false
	}
	_ = res.Body.Close() // only the status counts
	return res.StatusCode == http.StatusOK
}
