package appliance

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"sallyway/internal/appliance/config"
	"sallyway/internal/appliance/machine"
	"sallyway/internal/appliance/supervise"
	"sallyway/internal/daemon"
)

// A host with all roles enrols its own relay and gateway: nobody could hand it tokens of a platform that does not exist yet.

// enrolRetry is the wait after a try that failed.
const enrolRetry = 5 * time.Second

// enrolHere gets a token for a node from the platform on this host and puts it where the daemon looks for it. It tries until that works or
// ctx ends, whose error it then returns.
func (s *service) enrolHere(ctx context.Context, d *running) error {
	for {
		err := s.tokenFor(ctx, d)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !errors.Is(err, errPlatformStarts) {
			s.note(fmt.Sprintf("enrol the %s here: %v", d.role, err))
		}
		if err := pause(ctx, err); err != nil {
			return err
		}
	}
}

// pause waits until what failed with err may be tried again, or returns ctx's error.
func pause(ctx context.Context, err error) error {
	wait := enrolRetry
	if errors.Is(err, errPlatformStarts) {
		wait = watchFast
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(wait):
		return nil
	}
}

// sealedCredential is the file on the state partition with the credential that the console shows: the key that it is encrypted for, a line
// break, and the text.
var sealedCredential = filepath.Join(stateFolder, "appliance", "admin.age")

// handOver gives the administrator of a new platform a credential: encrypted for the configuration's key, on the console. A new key gets a new
// credential, which is also the way back in for who has lost the old one.
func (s *service) handOver(ctx context.Context, c *config.Config) {
	if c.AdminKey == "" {
		s.note("admin-key is missing in the configuration: nobody can log in at this platform for the first time; it is a public key that age-keygen prints")
		return
	}
	for {
		text, err := s.credentialFor(ctx, c)
		if err == nil {
			s.mu.Lock()
			s.node.sealed = text
			s.mu.Unlock()
			return
		}
		if !errors.Is(err, errPlatformStarts) {
			s.note("credential for the administrator: " + err.Error())
		}
		if pause(ctx, err) != nil {
			return
		}
	}
}

// credentialFor returns the encrypted credential; it makes one where there is none for the key, and shows it.
func (s *service) credentialFor(ctx context.Context, c *config.Config) (string, error) {
	if b, err := os.ReadFile(sealedCredential); err == nil {
		if key, text, _ := strings.Cut(string(b), "\n"); key == c.AdminKey {
			return text, nil
		}
	}
	if s.daemons[0].daemon.Status().State != supervise.Ready {
		return "", errPlatformStarts
	}
	out, err := s.asPlatform(ctx, "platformd", "admin", "token", "--data", s.daemons[0].folder(), "--name", "appliance console")
	if err != nil {
		return "", err
	}
	text, err := c.Seal(out)
	if err != nil {
		return "", err
	}
	if err := daemon.WriteFile(sealedCredential, []byte(c.AdminKey+"\n"+text), 0o600); err != nil {
		return "", err
	}
	s.console.Print("The administrator's credential, for who has the key of " + c.AdminKey + " (Enter shows it again):\n" +
		"  age --decrypt --identity KEYFILE CREDENTIAL | sallyway login --token-file -\n" + text)
	return text, nil
}

var errPlatformStarts = errors.New("the platform is not ready yet")

func (s *service) tokenFor(ctx context.Context, d *running) error {
	platform := s.daemons[0]
	if platform.daemon.Status().State != supervise.Ready {
		return errPlatformStarts
	}
	name := s.name(nil)
	args := []string{string(d.role), "create", name, "--json"}
	if d.role == config.Relay {
		host, _ := d.settings(s.result.Config)["advertise-ip"].(string)
		if all := addresses(s.net.Status()); host == "" && len(all) > 0 {
			host = all[0]
		}
		if host == "" {
			return errors.New("the relay's address is not known: there is no address yet, and advertise-ip is missing among the relay's settings")
		}
		args = append(args, "--host", host)
	}
	out, err := s.admin(ctx, args...)
	if err != nil { // it was made before, and the token was lost
		var again error
		if out, again = s.admin(ctx, string(d.role), "token", name, "--json"); again != nil {
			return err
		}
	}
	var made struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(out, &made); err != nil || made.Token == "" {
		return errors.New("the platform's answer has no token")
	}
	return secretFile(filepath.Join(runFolder, "credentials", d.name, "token"), []byte(made.Token), d.jail.UID)
}

// admin runs a verb of the sallyway program with the platform's own credential.
func (s *service) admin(ctx context.Context, args ...string) ([]byte, error) {
	return s.asPlatform(ctx, append([]string{"sallyway"}, args...)...)
}

// asPlatform runs a program as the platform's user and returns what it prints.
func (s *service) asPlatform(ctx context.Context, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	jail := machine.Jail{UID: platformUID}
	cmd := exec.CommandContext(ctx, executable, append([]string{jailWord, jail.String()}, args...)...)
	cmd.Dir, cmd.Env = "/", []string{"SALLYWAY_CREDENTIALS=" + filepath.Join(stateFolder, "platformd", "admin.token"), "HOME=/nonexistent", "TMPDIR=/tmp"}
	var errText bytes.Buffer
	cmd.Stderr = &errText
	out, err := cmd.Output()
	if err != nil {
		first, _, _ := strings.Cut(strings.TrimSpace(errText.String()), "\n")
		return nil, fmt.Errorf("%w: %.200s", err, first)
	}
	return out, nil
}
