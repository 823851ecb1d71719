package daemon

import (
	"errors"
	"fmt"
	"strings"
)

// Exit codes of every Sallyway program.
const (
	ExitOK               = 0 // all is well
	ExitDegraded         = 1 // it ran and failed, or runs with something missing
	ExitUsage            = 2 // wrong flags, configuration or environment: trying again changes nothing
	ExitEnrolmentRefused = 3 // the platform refused the token: a new one is needed
)

// Error is an error that knows its exit code and what the user reads. The zero Code is ExitDegraded, since an error
// never means success.
type Error struct {
	Code int
	// Message is what the user reads: one line that says what happened, then lines that say what to do. Empty means
	// the text of Err, or, without Err, that the command has printed everything itself.
	Message string
	Err     error // cause, for errors.Is; may be nil
}

func (e *Error) Error() string {
	switch {
	case e.Message != "":
		return e.Message
	case e.Err != nil:
		return e.Err.Error()
	}
	return fmt.Sprintf("exit code %d", e.exitCode())
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

func (e *Error) exitCode() int {
	if e.Code == ExitOK {
		return ExitDegraded
	}
	return e.Code
}

// Usagef makes an error with exit code 2. A cause given with %w is kept. The text may have several lines: what is
// wrong, then what to do.
func Usagef(format string, args ...any) error { return codef(ExitUsage, format, args...) }

// Refusedf makes an error with exit code 3: the platform refused to enrol this node.
func Refusedf(format string, args ...any) error { return codef(ExitEnrolmentRefused, format, args...) }

// Failf makes an error with exit code 1 and a text for the user.
func Failf(format string, args ...any) error { return codef(ExitDegraded, format, args...) }

func codef(code int, format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Message: err.Error(), Err: errors.Unwrap(err)}
}

// Silent makes an error that only sets the exit code, for commands that have already printed their result.
func Silent(code int) error { return &Error{Code: code} }

// ExitCode returns the exit code that err stands for: 0 for nil, 1 for an error that carries none.
func ExitCode(err error) int {
	if err == nil {
		return ExitOK
	}
	var e *Error
	if errors.As(err, &e) {
		return e.exitCode()
	}
	return ExitDegraded
}

// report returns what is printed for err: "name: first line" and the other lines indented below it. It is empty for
// a silent error.
func report(name string, err error) string {
	var e *Error
	if errors.As(err, &e) && e.Message == "" && e.Err == nil {
		return ""
	}
	lines := strings.Split(strings.TrimRight(err.Error(), "\n"), "\n")
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s\n", name, lines[0])
	for _, l := range lines[1:] {
		if l = strings.TrimSpace(l); l != "" {
			fmt.Fprintf(&b, "  %s\n", l)
		}
	}
	return b.String()
}
