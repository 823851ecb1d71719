package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/control/agent/link"
	"sallyway/internal/daemon"
)

// auditPoll is how often `audit tail -f` looks for news.
const auditPoll = 2 * time.Second

func (a *app) audit() *cobra.Command {
	return group("audit", "Audit: everything that granted or refused access, in a hash chain", `  sallyway audit tail -f
  sallyway audit export > audit.ndjson
  sallyway audit verify`, a.auditTail(), a.auditExport(), a.auditVerify())
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
		p, err := page[control.AuditEntry](ctx, r.c, r.c.path("audit"), r.cursor)
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
	return &cobra.Command{
		Use: "export", Short: "Write the whole log to standard output, one JSON document a line, oldest first", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "export the audit log", func(ctx context.Context, c *Client) error {
				entries, err := (&auditReader{c: c}).next(ctx)
				if err != nil {
					return err
				}
				lines := app{json: true}
				return lines.printEntries(cmd.OutOrStdout(), entries)
			})
		},
	}
}

func (a *app) auditVerify() *cobra.Command {
	return &cobra.Command{
		Use: "verify", Short: "Have the platform recompute the hash chain; exit code 1 when it is broken", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.do(cmd, "verify the audit log", func(ctx context.Context, c *Client) error {
				v, err := get[control.AuditVerification](ctx, c, c.path("audit:verify"))
				if err != nil {
					return err
				}
				err = a.show(cmd, v, func(w io.Writer) {
					if v.OK {
						fmt.Fprintf(w, "the chain is whole: %d entries\n", v.Entries)
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
}
