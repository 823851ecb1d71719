package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Main runs a program's command on os.Args and returns its exit code; it prints errors to standard error. The
// command's context ends at the first SIGINT or SIGTERM: the daemon then drains. A second signal ends the process at
// once with exit code 1.
//
// It first wipes tokens from the argument memory, so it has to be the first thing that main calls. Errors that cobra
// finds before a command runs (unknown command or flag, missing argument) have exit code 2.
func Main(root *cobra.Command) int {
	hideTokens(os.Args)
	ctx, stop := signalContext(context.Background(), func() {
		fmt.Fprintf(os.Stderr, "%s: second signal: stopping at once\n", root.Name())
		os.Exit(ExitDegraded)
	})
	defer stop()
	return run(ctx, root)
}

// signalContext returns a context that ends at the first signal, and calls abort at the second. The returned function
// waits until its goroutine has ended.
func signalContext(parent context.Context, abort func()) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for range 2 {
			select {
			case sig := <-signals:
				if ctx.Err() != nil {
					abort()
				}
				cancel(fmt.Errorf("signal: %v", sig))
			case <-quit:
				return
			}
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(quit)
		<-done
		cancel(nil)
	}
}

// ran marks an error of a command that has begun, as opposed to one of cobra's own.
type ran struct{ error }

func (r ran) Unwrap() error { return r.error }

func run(ctx context.Context, root *cobra.Command) int {
	root.SilenceErrors, root.SilenceUsage = true, true
	prepare(root)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return ExitOK
	}
	var r ran
	if !errors.As(err, &r) {
		err = Usagef("%w\nsee `%s --help`", err, cmd.CommandPath())
	} else {
		err = r.error
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			err = Failf("interrupted")
		}
	}
	fmt.Fprint(root.ErrOrStderr(), report(root.Name(), err))
	return ExitCode(err)
}

// prepare walks the command tree: it marks the errors of commands, and lets a group of commands (`sallyway relay`)
// refuse a word that it does not know, where cobra would print the help and call it a success.
func prepare(c *cobra.Command) {
	if verbs := []string{"up", "start", "serve", "run"}; slices.Contains(verbs, c.Name()) {
		c.SuggestFor = append(c.SuggestFor, verbs...) // each daemon starts with another of them
	}
	if !c.Runnable() && c.HasSubCommands() && c.HasParent() {
		c.RunE = func(c *cobra.Command, args []string) error {
			if len(args) == 0 {
				return c.Help()
			}
			var names []string
			for _, sub := range c.Commands() {
				names = append(names, sub.Name())
			}
			return Usagef("unknown command %q for %q%s\nsee `%s --help`", args[0], c.CommandPath(), didYouMean(args[0], names), c.CommandPath())
		}
	}
	mark := func(f func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
		if f == nil {
			return nil
		}
		return func(c *cobra.Command, args []string) error {
			if err := f(c, args); err != nil {
				return ran{err}
			}
			return nil
		}
	}
	c.PersistentPreRunE, c.PreRunE, c.RunE = mark(c.PersistentPreRunE), mark(c.PreRunE), mark(c.RunE)
	c.PostRunE, c.PersistentPostRunE = mark(c.PostRunE), mark(c.PersistentPostRunE)
	c.SetFlagErrorFunc(flagHint)
	for _, sub := range c.Commands() {
		prepare(sub)
	}
}

// flagHint adds the nearest flag to cobra's complaint about an unknown one.
func flagHint(c *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return err
	}
	var names []string
	c.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	names = slices.DeleteFunc(names, func(n string) bool { return n == "" })
	hint := didYouMean(unknown.GetSpecifiedName(), names)
	return fmt.Errorf("%w%s", err, strings.Replace(hint, `"`, `"--`, 1))
}
