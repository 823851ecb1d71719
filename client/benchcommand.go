package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/daemon"
	"sallyway/internal/trial"
	"sallyway/tunnel"
)

// benchUpgrade is the protocol that a GET /bench on the control socket switches to: lines of JSON, each a benchEvent. The one who asked
// hanging up ends the run.
const benchUpgrade = "sallyway-bench"

// benchEvent is a line of a run: what is being done, or its end.
type benchEvent struct {
	Step   string       `json:"step,omitempty"`
	Report *BenchReport `json:"report,omitempty"`
	Error  string       `json:"error,omitempty"`
}

// benchHandler measures for `sallyway bench` beside a running client, one at a time.
func benchHandler(s *Sessions, log *slog.Logger) http.Handler {
	var one sync.Mutex
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var cfg BenchConfig
		dec := json.NewDecoder(strings.NewReader(r.URL.Query().Get("run")))
		dec.DisallowUnknownFields()
		err := dec.Decode(&cfg)
		if err == nil {
			err = cfg.validate()
		}
		if err == nil {
			_, err = s.benchTarget(cfg.Target)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if !one.TryLock() {
			http.Error(w, "another bench runs now: wait for its end", http.StatusConflict)
			return
		}
		defer one.Unlock()
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer c.Close()
		if _, err := fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", benchUpgrade); err != nil {
			return
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		hung := make(chan struct{})
		go func() {
			defer close(hung)
			_, _ = io.Copy(io.Discard, c) // nothing is expected: it ends when the other side does, or with the close below
			cancel(errors.New("who asked has gone"))
		}()
		enc := json.NewEncoder(c)
		log.Info("bench", "target", cfg.Target, "time", cfg.Time, "flows", cfg.Flows)
		report, err := s.Bench(ctx, cfg, func(step string) { _ = enc.Encode(benchEvent{Step: step}) }) // a failure shows to the reader above
		if err != nil {
			log.Info("bench failed", "target", cfg.Target, "err", err)
			_ = enc.Encode(benchEvent{Error: benchError(err)})
		} else {
			_ = enc.Encode(benchEvent{Report: report})
		}
		c.Close()
		<-hung
	})
}

// benchError says what a run failed of, and what to do where that is known.
func benchError(err error) string {
	var pe *tunnel.ProxyError
	if errors.As(err, &pe) && pe.Type == tunnel.RequestDenied && strings.Contains(pe.Detail, "no resource of this gateway covers") {
		return "the gateway does not know of bench: it is older than this client; update gatewayd there"
	}
	return err.Error()
}

// benchOptions are the flags of `sallyway bench`.
type benchOptions struct {
	state    string
	time     time.Duration
	flows    int
	up, down bool
	udp      string
	json     bool
}

// BenchCommand is `sallyway bench`.
func BenchCommand() *cobra.Command {
	var o benchOptions
	cmd := &cobra.Command{
		Use:   "bench RESOURCE[:PORT] | GATEWAY",
		Short: "Measure your own path: round trips by hop, throughput each way, loss, latency under load",
		Long: `Measure the path to a gateway by load inside of the session that the running client (sallyway connect) has with it: the same relay, the
same encryption, the same limits as every connection. It takes about 15 seconds and uses what the path carries, so others on it will notice.

The other end is the gateway itself, which answers this to clients that may reach a resource there (gatewayd up --bench off turns it off).
Throughput is therefore that of the way to the gateway, not of the resource. Where a resource is named the gateway also opens TCP
connections to it and closes them at once, for the time of that last hop; nothing is sent to the resource.

How to read it:
  round trip    client → relay and client → gateway tell where the way is long; gateway → relay is the other half
  lost          packets that the sender sent again: above 0.1 % on a long way it is what limits throughput
  window        what the sender may have under way; divided by the round trip it is the most that a session can carry then
  small messages meanwhile   what an ssh session beside a download feels; far above idle means a queue on the way
  limited by    said only where these figures show it`,
		Example: `  sallyway bench db                     # resource db, on the first TCP port it names
  sallyway bench web:443 --time 10s
  sallyway bench office --flows 8 --down
  sallyway bench office --udp 50M       # paced datagrams at 50 Mbit/s; off: none
  sallyway bench db --json | jq .up.bits_per_second`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch len(args) {
			case 1:
				return nil
			case 0:
				return fmt.Errorf("the resource or gateway is missing: %s", cmd.UseLine())
			}
			return fmt.Errorf("%q is too much: %s", args[1], cmd.UseLine())
		},
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, args[0]) },
	}
	f := cmd.Flags()
	f.StringVar(&o.state, "state", daemon.DefaultStateDir(spec.StateName), "state folder of the running client")
	f.DurationVar(&o.time, "time", DefaultBenchTime, fmt.Sprintf("how long to load each direction, %v at most", trial.MaxTime))
	f.IntVar(&o.flows, "flows", 1, fmt.Sprintf("flows at once, %d at most", trial.MaxFlows))
	f.BoolVar(&o.up, "up", false, "only towards the gateway")
	f.BoolVar(&o.down, "down", false, "only from the gateway")
	f.StringVar(&o.udp, "udp", "auto", "rate of paced datagrams, such as 500k or 20M (bits per second), auto or off")
	f.BoolVar(&o.json, "json", false, "print JSON")
	daemon.Bind(cmd)
	return cmd
}

// parsePaced reads --udp: 0 is auto, negative off.
func parsePaced(s string) (float64, error) {
	switch s {
	case "auto", "":
		return 0, nil
	case "off":
		return -1, nil
	}
	unit, digits := 1.0, s
	for suffix, u := range map[string]float64{"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9} {
		if d, ok := strings.CutSuffix(s, suffix); ok {
			unit, digits = u, d
		}
	}
	v, err := strconv.ParseFloat(digits, 64)
	if err != nil || !(v*unit >= 1e3 && v*unit <= maxPaced) { // NaN is neither
		return 0, fmt.Errorf("--udp %.20q: want auto, off, or 1k to %.0fM bits per second", s, maxPaced/1e6)
	}
	return v * unit, nil
}

func (o *benchOptions) run(cmd *cobra.Command, target string) error {
	paced, err := parsePaced(o.udp)
	if err != nil {
		return daemon.Usagef("%w", err)
	}
	if o.time <= 0 || o.flows <= 0 {
		return daemon.Usagef("--time and --flows must be more than 0")
	}
	cfg := BenchConfig{Target: target, Time: o.time, Flows: o.flows, Up: o.up, Down: o.down, UDP: paced}
	if err := cfg.validate(); err != nil {
		return daemon.Usagef("%w", err)
	}
	q, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	conn, err := daemon.Dial(o.state).Upgrade(cmd.Context(), "/bench?run="+url.QueryEscape(string(q)), benchUpgrade)
	if err != nil {
		return o.explain(err)
	}
	stop := context.AfterFunc(cmd.Context(), func() { _ = conn.Close() }) // the daemon ends the run
	defer stop()
	defer conn.Close()
	dec := json.NewDecoder(conn)
	for {
		var e benchEvent
		if err := dec.Decode(&e); err != nil {
			if cmd.Context().Err() != nil {
				return context.Canceled
			}
			return daemon.Failf("bench %s: the client ended before it was done; see its log", target)
		}
		switch {
		case e.Error != "":
			return daemon.Failf("bench %s: %s", target, e.Error)
		case e.Report != nil:
			return o.print(cmd.OutOrStdout(), e.Report)
		case !o.json:
			fmt.Fprintf(cmd.ErrOrStderr(), "%s …\n", e.Step)
		}
	}
}

// explain says what to do about a daemon that does not measure.
func (o *benchOptions) explain(err error) error {
	var answer *daemon.AnswerError
	switch {
	case errors.Is(err, daemon.ErrNotRunning):
		return daemon.Failf("%w\nbench measures in the session of a running client: start `sudo sallyway connect`, or name its state folder with --state", err)
	case errors.As(err, &answer) && answer.Status == http.StatusNotFound:
		return daemon.Failf("the running client does not know of bench: it is older than this program; restart it")
	case errors.As(err, &answer) && answer.Status == http.StatusBadRequest:
		return daemon.Usagef("bench: %s", answer.Text)
	case errors.As(err, &answer):
		return daemon.Failf("bench: %s", answer.Text)
	}
	return daemon.Failf("bench: %w", err)
}

func (o *benchOptions) print(w io.Writer, r *BenchReport) error {
	if !o.json {
		r.Text(w)
		return nil
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(r)
}
