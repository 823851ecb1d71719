package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sallyway/internal/telemetry"
	"sallyway/internal/version"
)

// allTraces is the default of --trace-ratio.
const allTraces = 1

// TelemetryFlags adds the flags that say where metrics and traces go.
func TelemetryFlags(f *pflag.FlagSet, endpoint *string, ratio *float64) {
	f.StringVar(endpoint, "otlp-endpoint", *endpoint, "URL of an OTLP collector for metrics and traces, such as http://127.0.0.1:4318 (default: OTEL_EXPORTER_OTLP_ENDPOINT, or off)")
	f.Float64Var(ratio, "trace-ratio", allTraces, "share of the traces beginning here that is sampled, from 0 to 1; those of others are sampled as they say")
}

// openTelemetry prepares what sends, nil when it is off. What flags say wins over the standard variables.
func openTelemetry(service, endpoint string, ratio float64, r *Registry, log *slog.Logger) (*telemetry.Telemetry, error) {
	set, err := telemetry.Environment(os.LookupEnv)
	if err != nil {
		return nil, Usagef("%w", err)
	}
	if endpoint != "" {
		set.Endpoint, set.Disabled = endpoint, false
	}
	if set.Ratio == nil || ratio != allTraces {
		set.Ratio = &ratio
	}
	cfg := telemetry.Config{Settings: set, Service: service, Version: version.Get().Version, Log: log}
	if r != nil {
		cfg.Gatherer, cfg.Metrics = r, r
	}
	t, err := telemetry.New(cfg)
	if err != nil {
		return nil, Usagef("%w\nsee --otlp-endpoint, and the environment variables OTEL_…", err)
	}
	return t, nil
}

// traceparent is the environment variable by which a program that calls this one names its span.
const traceparent = "TRACEPARENT"

// TraceCommands has every command of a program be a span, where the environment names a collector; the requests that it makes carry it, so that
// what the programs that it asks do is below. Daemons are left alone: they trace what they do, not how long they run.
func TraceCommands(root *cobra.Command) {
	for _, c := range root.Commands() {
		TraceCommands(c)
	}
	if root.RunE == nil || root.Flags().Lookup("otlp-endpoint") != nil {
		return
	}
	run := root.RunE
	root.RunE = func(cmd *cobra.Command, args []string) error {
		log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn})) // the rest is the command's own output
		t, err := openTelemetry(cmd.Root().Name(), os.Getenv(EnvPrefix+"OTLP_ENDPOINT"), allTraces, nil, log)
		if err != nil {
			return err
		}
		if t == nil {
			return run(cmd, args)
		}
		ctx := cmd.Context()
		sending, stop := context.WithCancel(context.WithoutCancel(ctx))
		ended := make(chan struct{})
		go func() { defer close(ended); _ = t.Run(sending) }() // it returns nil
		defer func() { stop(); <-ended }()
		if v := os.Getenv(traceparent); v != "" {
			ctx = telemetry.WithParent(ctx, v)
		}
		ctx, span := t.Tracer().Start(ctx, cmd.CommandPath(), telemetry.Client)
		defer span.End()
		cmd.SetContext(ctx)
		if err = run(cmd, args); err != nil {
			span.Fail(fmt.Sprintf("exit code %d", ExitCode(err)))
		}
		return err
	}
}
