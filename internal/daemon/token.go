package daemon

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// maxToken bounds a token. A real one has a few hundred bytes.
const maxToken = 64 << 10

// tokenCredential is the name under which the unit's LoadCredential hands over the token.
const tokenCredential = "token"

// TokenFlags are the ways to hand over an enrolment token: a file or standard input (--token-file), the command line
// (--token), the environment (SALLYWAY_TOKEN, SALLYWAY_TOKEN_FILE), the configuration file, a systemd credential.
type TokenFlags struct {
	file  string
	token Secret
	root  string
}

// RootPin is the key hash of the organization's root, named out of band by its owner; "" is none.
func (t *TokenFlags) RootPin() string { return t.root }

// Register adds the flags.
func (t *TokenFlags) Register(flags *pflag.FlagSet) {
	flags.StringVar(&t.file, "token-file", "", "file with the enrolment token, - for standard input")
	flags.Var((*secretValue)(&t.token), "token", "the enrolment token itself (other users may see it: prefer --token-file)")
	flags.StringVar(&t.root, "root-pin", "", "key hash of the organization's root, from its owner: at its enrolment this node takes no other from the platform")
}

// rankFlag is the rank of a value that stood on the command line.
const rankFlag = 3

// rank orders the layers of configuration.
func rank(f *pflag.Flag) int {
	switch Source(f) {
	case "flag":
		return rankFlag
	case "env":
		return 2
	case "file":
		return 1
	}
	return 0
}

// Read returns the token, with white space around it removed, or "" where none was given: a node that is enrolled
// needs none. It warns on log where the token could be seen by others. SALLYWAY_TOKEN leaves the environment, so that
// child processes do not inherit it.
func (t *TokenFlags) Read(cmd *cobra.Command, log *slog.Logger) (Secret, error) {
	defer os.Unsetenv(envName("token"))
	var inline, file int
	if f := cmd.Flags().Lookup("token"); f != nil {
		inline = rank(f)
	}
	if f := cmd.Flags().Lookup("token-file"); f != nil {
		file = rank(f)
	}
	switch {
	case inline > 0 && inline == file:
		return "", Usagef("both a token and a token file are given\nuse one of --token-file and --token")
	case inline > file:
		if inline == rankFlag {
			log.Warn("a token on the command line can be seen by other users while the program starts, and stays in the shell's history; use --token-file")
		}
		return cleanToken([]byte(t.token.Reveal()), "--token")
	case file > 0:
		return t.readFile(cmd.InOrStdin(), cmd.ErrOrStderr(), log)
	}
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return "", nil
	}
	path := filepath.Join(dir, tokenCredential)
	b, err := readLimited(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", Usagef("read the token: %w", err)
	}
	if len(bytes.TrimSpace(b)) == 0 {
		return "", nil // the unit's placeholder
	}
	return cleanToken(b, path)
}

func (t *TokenFlags) readFile(stdin io.Reader, prompt io.Writer, log *slog.Logger) (Secret, error) {
	if t.file == "-" {
		if typed(stdin) {
			fmt.Fprintln(prompt, "Paste the token, then press Enter:")
			line, err := bufio.NewReader(io.LimitReader(stdin, maxToken+1)).ReadBytes('\n')
			if err != nil && !errors.Is(err, io.EOF) {
				return "", Usagef("read the token from the terminal: %w", err)
			}
			return cleanToken(line, "standard input")
		}
		b, err := io.ReadAll(io.LimitReader(stdin, maxToken+1))
		if err != nil {
			return "", Usagef("read the token from standard input: %w", err)
		}
		return cleanToken(b, "standard input")
	}
	b, err := readLimited(t.file)
	if err != nil {
		return "", Usagef("read the token: %w", err)
	}
	if fi, err := os.Stat(t.file); err == nil && fi.Mode().IsRegular() && fi.Mode().Perm()&0o077 != 0 {
		log.Warn("the token file can be read by other users; chmod 600 it", "path", t.file, "mode", fi.Mode().Perm())
	}
	return cleanToken(b, t.file)
}

// typed says whether a person types what r reads: it is a terminal, or another character device that is not /dev/null.
func typed(r io.Reader) bool {
	f, ok := r.(*os.File)
	if !ok {
		return false
	}
	fi, err := f.Stat()
	if err != nil || fi.Mode()&fs.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(fi, null)
}

func readLimited(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxToken+1))
}

// cleanToken removes white space around the token. Errors name its source and never the token.
func cleanToken(b []byte, source string) (Secret, error) {
	if len(b) > maxToken {
		return "", Usagef("the token from %s is larger than %d bytes\nis it the right file?", source, maxToken)
	}
	b = bytes.TrimSpace(b)
	if len(b) == 0 {
		return "", Usagef("the token from %s is empty\na new one is printed by `sallyway relay|gateway|client token NAME`", source)
	}
	if bytes.ContainsAny(b, " \t\r\n\x00") {
		return "", Usagef("the token from %s holds more than one word\nhand over the token alone", source)
	}
	return Secret(b), nil
}

// secretValue is a flag that never shows its value in help or errors.
type secretValue Secret

var _ pflag.Value = (*secretValue)(nil)

func (s *secretValue) Set(v string) error {
	*s = secretValue(strings.Clone(v))
	return nil
}

func (s *secretValue) Type() string   { return "token" }
func (s *secretValue) String() string { return "" }

// hideTokens replaces args by copies and overwrites the originals' token values, which on Linux are the argument
// memory that /proc/PID/cmdline shows. It must be called before anything else keeps a part of args.
func hideTokens(args []string) {
	for i := range args {
		original := args[i]
		args[i] = strings.Clone(original)
		switch {
		case strings.HasPrefix(original, "--token="):
			wipe(original[len("--token="):])
		case i > 0 && args[i-1] == "--token":
			wipe(original)
		}
	}
}

// wipe overwrites a string that lies in the process's argument memory (the Go runtime does not copy it on Linux).
func wipe(s string) {
	if s == "" {
		return
	}
	b := unsafe.Slice(unsafe.StringData(s), len(s))
	for i := range b {
		b[i] = 'x'
	}
}
