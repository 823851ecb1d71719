package agent

import (
	"errors"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
)

// Program is how a person makes a node and starts it, for texts that say what to do.
type Program struct {
	Create  string // where they are admin: sallyway gateway create NAME
	Start   string // on the node: sudo gatewayd up
	Install string // on a node where systemd runs it: sudo gatewayd install; empty where there is none
}

// Token reads the enrolment token that a start command was given, "" for none. A host that has neither a token nor a node in its state
// folder is told what is missing, before anything on it is touched.
func (p Program) Token(cmd *cobra.Command, o *daemon.Options) (string, error) {
	log, err := daemon.NewLogger(cmd.ErrOrStderr(), o.LogLevel, o.LogFormat)
	if err != nil {
		return "", err
	}
	token, err := o.Token.Read(cmd, log)
	if err != nil {
		return "", err
	}
	if token.Reveal() == "" && !Enrolled(o.State) {
		return "", p.Error(ErrNotEnrolled)
	}
	t, err := control.ParseToken(token.Reveal())
	if pin := o.Token.RootPin(); pin != "" && err == nil {
		t.Root = pin
		return t.String(), nil
	}
	return token.Reveal(), nil // Open says what is wrong with it
}

// Error gives an error of Open its exit code, and where no token was given the way to one.
func (p Program) Error(err error) error {
	var refused *EnrolmentRefusedError
	switch {
	case errors.Is(err, ErrNotEnrolled) && p.Install != "" && os.Getenv("SYSTEMD_EXEC_PID") == strconv.Itoa(os.Getpid()): // systemd.exec(5): this is a unit's process
		return daemon.Usagef("this host is not enrolled and no token was given.\nWhere you are admin, run: %s   and then here: %s --token-file -", p.Create, p.Install)
	case errors.Is(err, ErrNotEnrolled):
		return daemon.Usagef("this host is not enrolled and no token was given.\nWhere you are admin, run: %s   and then here: %s --token-file FILE\nTo try everything on one machine first: make demo, in Sallyway's source folder", p.Create, p.Start)
	case errors.As(err, &refused):
		return daemon.Refusedf("%w", err)
	}
	return daemon.Failf("%w", err)
}
