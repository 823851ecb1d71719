package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/auditfile"
	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
	"sallyway/internal/identity"
	"sallyway/internal/platformapi"
)

// auditPoll is how often `audit tail -f` looks for news.
const auditPoll = 2 * time.Second

func (a *app) audit() *cobra.Command {
	return group("audit", "Audit: everything that granted or refused access, in a hash chain", `  sallyway audit tail -f
  sallyway audit export -o audit.jsonl
  sallyway audit verify audit.jsonl`, a.auditTail(), a.auditExport(), a.auditVerify())
}

// auditReader reads the chain forwards and remembers where it was.
type auditReader struct {
	c      *Client
	cursor string
	seq    int64 // of the last entry handed out
}

// next returns the entries that came since, oldest first.
func (r *auditReader) next(ctx context.Context) ([]control.AuditEntry, error) {
	var news []control.AuditEntry
	for {
		p, err := r.c.ListAudit(ctx, r.c.org, platformapi.Page{Limit: pageSize, Cursor: r.cursor})
		if err != nil {
			return nil, err
		}
		for _, e := range p.Items {
			if e.Seq > r.seq {
				news = append(news, e)
			}
		}
		if p.NextCursor == "" || p.NextCursor == r.cursor {
			break // the last page is asked for again: it grows
		}
		r.cursor = p.NextCursor
	}
	slices.SortFunc(news, func(a, b control.AuditEntry) int { return cmp.Compare(a.Seq, b.Seq) })
	if len(news) > 0 {
		r.seq = news[len(news)-1].Seq
	}
	return news, nil
}

func (a *app) auditTail() *cobra.Command {
	var lines int
	var follow bool
	cmd := &cobra.Command{
		Use: "tail [-n N] [-f]", Short: "Show the newest entries, and with -f those to come", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "read the audit log", func(ctx context.Context, c *Client) error {
				r := auditReader{c: c}
				entries, err := r.next(ctx)
				if err != nil {
					return err
				}
				entries = entries[max(0, len(entries)-max(lines, 0)):]
				if !follow {
					return a.printEntries(cmd.OutOrStdout(), entries)
				}
				return a.follow(cmd, &r, entries)
			})
		},
	}
	cmd.Flags().IntVarP(&lines, "lines", "n", 20, "how many")
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on until interrupted")
	return cmd
}

// follow prints entries as they come until the command is interrupted. A platform that is away for a while is waited for.
func (a *app) follow(cmd *cobra.Command, r *auditReader, entries []control.AuditEntry) error {
	ctx := cmd.Context()
	t := time.NewTicker(a.poll)
	defer t.Stop()
	away := false
	for {
		if err := a.printEntries(cmd.OutOrStdout(), entries); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		var err error
		entries, err = r.next(ctx)
		var unreachable *link.Error
		switch {
		case err == nil:
			away = false
		case ctx.Err() != nil:
			return nil
		case errors.As(err, &unreachable):
			if !away {
				fmt.Fprintln(cmd.ErrOrStderr(), "waiting:", unreachable.Reason)
			}
			away = true
		default:
			return err
		}
	}
}

// printEntries prints entries as text, or one JSON document a line.
func (a *app) printEntries(w io.Writer, entries []control.AuditEntry) error {
	for _, e := range entries {
		if a.json {
			if err := json.NewEncoder(w).Encode(e); err != nil {
				return err
			}
			continue
		}
		var detail []string
		for _, k := range sortedKeys(e.Detail) {
			if v := detailText(e.Detail[k]); v != "" {
				detail = append(detail, k+"="+v)
			}
		}
		line := fmt.Sprintf("%s  %-7s  %-20s  %s  by %s  %s", e.At.UTC().Format(time.RFC3339), e.Result, e.Action, e.Object, e.Actor, strings.Join(detail, " "))
		if _, err := fmt.Fprintln(w, strings.TrimRight(printable(line), " ")); err != nil {
			return err
		}
	}
	return nil
}

// detailText writes a value of an entry's detail: a string as it is, nothing for nothing, else JSON.
func detailText(v any) string {
	switch v := v.(type) {
	case nil:
		return ""
	case string:
		return v
	}
	b, err := json.Marshal(v)
	if err != nil || string(b) == "[]" {
		return ""
	}
	return string(b)
}

func (a *app) auditExport() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use: "export [-o FILE]", Short: "Write the whole log with its signatures, one JSON document a line, oldest first", Args: cobra.NoArgs,
		Long: `Write the whole log with its signatures and the certificates of who signed, one JSON document a line, oldest first. The lines say what they are by
their type: chain, entry, key, checkpoint. Keep such files where the platform's operators can not change them: sallyway audit verify FILE
checks them without the platform.`,
		Example: `  sallyway audit export -o audit-2027-03.jsonl
  sallyway audit export | jq -c 'select(.type == "entry")'`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "export the audit log", func(ctx context.Context, c *Client) error {
				body, err := c.ExportAudit(ctx, c.org)
				if err != nil {
					return err
				}
				defer body.Close()
				return save(cmd, file, body)
			})
		},
	}
	cmd.Flags().StringVarP(&file, "output", "o", "", "file to write (default: standard output)")
	return cmd
}

// save copies what the platform sends to a file, which is there whole or not at all, or to standard output.
func save(cmd *cobra.Command, file string, body io.Reader) error {
	if file == "" || file == "-" {
		_, err := io.Copy(cmd.OutOrStdout(), body)
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".export-*") // 0600: it tells who reaches what
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = io.Copy(f, body)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	fmt.Fprintln(cmd.ErrOrStderr(), "wrote", file)
	return nil
}

func (a *app) auditVerify() *cobra.Command {
	var pins []string
	var earlier string
	cmd := &cobra.Command{
		Use: "verify [FILE] [--root-pin PIN] [--earlier FILE]", Short: "Check the hash chain and its signatures; exit code 1 when something is wrong", Args: cobra.MaximumNArgs(1),
		Long: `Check the hash chain and its signatures: of an export in a file (- is standard input), which needs neither the platform nor a login; without a file the
platform checks its own log and says what it found.

--root-pin is the key hash of the organization's root as you know it from elsewhere, such as from when the organization was made: without it
the file's own word is taken for who signed. --earlier is an export from before: it must be the beginning of this one.

The exit code is 1 when something is wrong; the first line where it shows is named.`,
		Example: `  sallyway audit verify audit.jsonl --root-pin 3f5c… --earlier audit-last-month.jsonl
  sallyway audit verify`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return a.verifyFile(cmd, args[0], pins, earlier)
			}
			if len(pins) > 0 || earlier != "" {
				return daemon.Usagef("--root-pin and --earlier are for a file: sallyway audit export -o FILE, then sallyway audit verify FILE")
			}
			return a.do(cmd, "verify the audit log", func(ctx context.Context, c *Client) error {
				v, err := c.VerifyAudit(ctx, c.org)
				if err != nil {
					return err
				}
				err = a.show(cmd, v, func(w io.Writer) {
					if v.OK {
						fmt.Fprintf(w, "the chain is whole: %d entries, signed up to entry %d\n", v.Entries, v.Signed)
					} else {
						fmt.Fprintf(w, "THE CHAIN IS BROKEN after %d entries: %s\n", v.Entries, printable(v.Problem))
					}
				})
				if err != nil || v.OK {
					return err
				}
				return daemon.Silent(daemon.ExitDegraded)
			})
		},
	}
	cmd.Flags().StringSliceVar(&pins, "root-pin", nil, "key hash of the organization's root")
	cmd.Flags().StringVar(&earlier, "earlier", "", "an earlier export of the same log")
	return cmd
}

// verifyFile checks an export without the platform.
func (a *app) verifyFile(cmd *cobra.Command, file string, pins []string, earlier string) error {
	var o auditfile.Options
	var err error
	if o.Pins, err = parseAll(pins, "--root-pin", func(s string) (h identity.KeyHash, err error) { return h, h.UnmarshalText([]byte(s)) }); err != nil {
		return err
	}
	in := cmd.InOrStdin()
	if file != "-" {
		f, err := os.Open(file)
		if err != nil {
			return daemon.Usagef("%w", err)
		}
		defer f.Close()
		in = f
	}
	if earlier != "" {
		f, err := os.Open(earlier)
		if err != nil {
			return daemon.Usagef("--earlier: %w", err)
		}
		defer f.Close()
		o.Earlier = f
	}
	r, err := auditfile.Verify(in, o)
	if err != nil {
		return daemon.Failf("read %s: %w", file, err)
	}
	if err := a.show(cmd, r, func(w io.Writer) { showReport(w, r, earlier) }); err != nil || r.OK {
		return err
	}
	return daemon.Silent(daemon.ExitDegraded)
}

func showReport(w io.Writer, r *auditfile.Report, earlier string) {
	if !r.OK {
		fmt.Fprintf(w, "THE LOG IS NOT GOOD, line %d: %s\n", r.Line, printable(r.Problem))
		return
	}
	fmt.Fprintf(w, "the log of %s is whole: %d entries, %d signatures\n", printable(r.Org), r.Entries, r.Checkpoints)
	if r.Earlier {
		fmt.Fprintf(w, "%s is its beginning\n", printable(earlier))
	}
	switch beyond := r.Beyond(); {
	case r.Checkpoints == 0:
		fmt.Fprintln(w, "NOTHING SIGNS IT YET: entries at its end could be missing or made up. A platform signs every hour, and when it stops")
	case beyond > 0:
		fmt.Fprintf(w, "signed up to entry %d at %s; %d entries are beyond that: what was cut off there leaves no trace\n", r.Signed, r.SignedAt.UTC().Format(time.RFC3339), beyond)
	default:
		fmt.Fprintf(w, "signed up to its end, at %s\n", r.SignedAt.UTC().Format(time.RFC3339))
	}
	if !r.Pinned {
		fmt.Fprintln(w, "WHO SIGNED IS THE FILE'S OWN WORD: compare its root with the one that you know, and give it as --root-pin:")
		for _, p := range r.Roots {
			fmt.Fprintln(w, "  "+p.String())
		}
	}
}
