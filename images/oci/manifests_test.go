package oci_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"sallyway/images/oci"
)

// compose is what compose.yaml may hold; another key is an error.
type compose struct {
	Hardened service                      `yaml:"x-hardened"`
	Services map[string]service           `yaml:"services"`
	Secrets  map[string]map[string]string `yaml:"secrets"`
	Volumes  map[string]*struct{}         `yaml:"volumes"`
}

type service struct {
	Image           string            `yaml:"image"`
	Profiles        []string          `yaml:"profiles"`
	Entrypoint      []string          `yaml:"entrypoint"`
	Command         []string          `yaml:"command"`
	Environment     map[string]string `yaml:"environment"`
	Ports           []string          `yaml:"ports"`
	Volumes         []string          `yaml:"volumes"`
	Secrets         []string          `yaml:"secrets"`
	Sysctls         []string          `yaml:"sysctls"`
	ReadOnly        bool              `yaml:"read_only"`
	CapDrop         []string          `yaml:"cap_drop"`
	SecurityOpt     []string          `yaml:"security_opt"`
	Restart         string            `yaml:"restart"`
	StopGracePeriod string            `yaml:"stop_grace_period"`
	Healthcheck     *struct {
		Test        []string `yaml:"test"`
		Interval    string   `yaml:"interval"`
		Timeout     string   `yaml:"timeout"`
		Retries     int      `yaml:"retries"`
		StartPeriod string   `yaml:"start_period"`
	} `yaml:"healthcheck"`
}

// known are the programs by name.
func known() map[string]oci.Program {
	m := map[string]oci.Program{}
	for _, p := range oci.Programs() {
		m[p.Name] = p
	}
	return m
}

func TestCompose(t *testing.T) {
	text, err := os.ReadFile("compose.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var c compose
	dec := yaml.NewDecoder(bytes.NewReader(text))
	dec.KnownFields(true)
	if err := dec.Decode(&c); err != nil {
		t.Fatal(err)
	}
	cmds, programs := commands(t), known()
	want := map[string]string{"platform": "platformd", "relay": "relayd", "gateway": "gatewayd", "client": "sallyway", "admin": "sallyway"}
	if len(c.Services) != len(want) {
		t.Errorf("%d services, want %d", len(c.Services), len(want))
	}
	for name, program := range want {
		t.Run(name, func(t *testing.T) {
			s, p, cmd := c.Services[name], programs[program], cmds[program]
			if !strings.HasPrefix(s.Image, "${SALLYWAY_IMAGES:-"+oci.DefaultRepository+"}/"+program+":${SALLYWAY_VERSION:?") {
				t.Errorf("image %s", s.Image)
			}
			if !s.ReadOnly || !slices.Equal(s.CapDrop, []string{"ALL"}) || !slices.Equal(s.SecurityOpt, []string{"no-new-privileges:true"}) {
				t.Error("it is not confined")
			}
			if first := s.Volumes[0]; first != name+":"+oci.StateRoot {
				t.Errorf("state in %s", first)
			}
			for _, v := range s.Volumes {
				volume, _, _ := strings.Cut(v, ":")
				if _, ok := c.Volumes[volume]; !ok {
					t.Errorf("no volume %s", volume)
				}
			}
			if name == "admin" {
				if !slices.Equal(s.Entrypoint, []string{p.Path()}) || s.Restart != "no" || s.Ports != nil {
					t.Errorf("entry point %q, restart %q", s.Entrypoint, s.Restart)
				}
				return
			}
			if s.Restart != "unless-stopped" || s.Entrypoint != nil {
				t.Errorf("restart %q, entry point %q", s.Restart, s.Entrypoint)
			}
			if h := s.Healthcheck; h == nil || !slices.Equal(h.Test, append([]string{"CMD", p.Path()}, p.Health...)) {
				t.Errorf("health check %+v", h)
			}
			published(t, s, p)
			fits(t, cmd, s.Environment, s.Command)
			graceful(t, cmd, s.StopGracePeriod)
			if program == "platformd" {
				return
			}
			if len(s.Secrets) != 1 || s.Environment["SALLYWAY_TOKEN_FILE"] != "/run/secrets/"+s.Secrets[0] || c.Secrets[s.Secrets[0]]["file"] != "./secrets/"+name+".token" {
				t.Errorf("the token of %v comes from %q", s.Secrets, s.Environment["SALLYWAY_TOKEN_FILE"])
			}
		})
	}
	relay := func(flag string) string { return cmds["relayd"].Flags().Lookup(flag).DefValue }
	all := relay("min-port") + "-" + relay("max-port")
	if line := fmt.Sprintf(`# - "%s:%s/udp" # all`, all, all); !strings.Contains(string(text), line) {
		t.Errorf("the relayed ports are not offered: %s", line)
	}
}

// published wants a service to publish what its program listens on, and nothing else.
func published(t *testing.T, s service, p oci.Program) {
	t.Helper()
	var inside []string
	for _, port := range s.Ports {
		outer, inner, ok := strings.Cut(port, ":")
		number, _, _ := strings.Cut(inner, "/")
		if !ok || (outer != number && p.Name != "platformd") || (p.Name == "platformd" && outer != "443") {
			t.Errorf("port %s", port)
		}
		inside = append(inside, inner)
	}
	if !slices.Equal(inside, p.Ports) {
		t.Errorf("publishes %q, want %q", inside, p.Ports)
	}
}

// fits wants environment and arguments to be what the command knows.
func fits(t *testing.T, cmd *cobra.Command, env map[string]string, args []string) {
	t.Helper()
	for variable := range env {
		if flagOf(cmd, variable) == "" || variable == "SALLYWAY_TOKEN" {
			t.Errorf("no flag of %s is set by %s", cmd.Name(), variable)
		}
	}
	if err := cmd.ParseFlags(args); err != nil {
		t.Errorf("arguments %q: %v", args, err)
	}
}

// graceful wants a stop to leave time for the drain.
func graceful(t *testing.T, cmd *cobra.Command, grace string) {
	t.Helper()
	d, err := time.ParseDuration(grace)
	if err != nil || d < 20*time.Second {
		t.Errorf("a stop has %q: %v", grace, err)
	}
	if f := cmd.Flags().Lookup("drain-timeout"); f != nil {
		if drain, err := time.ParseDuration(f.DefValue); err != nil || d < drain+10*time.Second {
			t.Errorf("a stop has %v, a drain takes %s", d, f.DefValue)
		}
	}
}

func TestKubernetes(t *testing.T) {
	b, err := os.ReadFile("kubernetes.yaml")
	if err != nil {
		t.Fatal(err)
	}
	type probe struct {
		Exec struct{ Command []string }
	}
	type object struct {
		APIVersion string `yaml:"apiVersion"`
		Kind       string
		Metadata   struct{ Name string }
		Spec       struct {
			Replicas int
			Strategy struct{ Type string }
			Template struct {
				Spec struct {
					Automount *bool `yaml:"automountServiceAccountToken"`
					Grace     int   `yaml:"terminationGracePeriodSeconds"`
					Security  struct {
						NonRoot bool   `yaml:"runAsNonRoot"`
						User    int    `yaml:"runAsUser"`
						Group   int    `yaml:"fsGroup"`
						Change  string `yaml:"fsGroupChangePolicy"`
					} `yaml:"securityContext"`
					Containers []struct {
						Image    string
						Env      []struct{ Name, Value string }
						Args     []string
						Security struct {
							Escalation   *bool `yaml:"allowPrivilegeEscalation"`
							ReadOnly     bool  `yaml:"readOnlyRootFilesystem"`
							Capabilities struct{ Drop []string }
						} `yaml:"securityContext"`
						Startup   probe `yaml:"startupProbe"`
						Readiness probe `yaml:"readinessProbe"`
						Liveness  probe `yaml:"livenessProbe"`
						Mounts    []struct {
							Name string
							Path string `yaml:"mountPath"`
						} `yaml:"volumeMounts"`
					}
					Volumes []struct {
						Name string
						PVC  struct {
							ClaimName string `yaml:"claimName"`
						} `yaml:"persistentVolumeClaim"`
						Secret struct {
							SecretName string `yaml:"secretName"`
						}
					}
				}
			}
		}
	}
	objects := map[string]object{}
	for dec := yaml.NewDecoder(bytes.NewReader(b)); ; {
		var o object
		err := dec.Decode(&o)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		objects[o.Kind] = o
	}
	if len(objects) != 3 {
		t.Fatalf("%d kinds", len(objects))
	}
	d := objects["Deployment"].Spec
	pod := d.Template.Spec
	if d.Replicas != 1 || d.Strategy.Type != "Recreate" {
		t.Errorf("%d replicas by %s: two would share an identity", d.Replicas, d.Strategy.Type)
	}
	if s := pod.Security; !s.NonRoot || s.User != oci.UID || s.Group != oci.UID || s.Change != "OnRootMismatch" || pod.Automount == nil || *pod.Automount {
		t.Errorf("pod: %+v", s)
	}
	c, p := pod.Containers[0], known()["gatewayd"]
	if s := c.Security; s.Escalation == nil || *s.Escalation || !s.ReadOnly || !slices.Equal(s.Capabilities.Drop, []string{"ALL"}) {
		t.Errorf("container: %+v", s)
	}
	if !strings.HasPrefix(c.Image, "registry.example/sallyway/"+p.Name+":") {
		t.Errorf("image %s", c.Image)
	}
	check := append([]string{p.Path()}, p.Health...)
	// It is started anew when it does not live, and not while it merely waits for the platform or a relay.
	if live := append(slices.Clone(check), "--live"); !slices.Equal(c.Startup.Exec.Command, check) || !slices.Equal(c.Readiness.Exec.Command, check) || !slices.Equal(c.Liveness.Exec.Command, live) {
		t.Errorf("probes %q, %q and %q, want %q and for the last --live", c.Startup.Exec.Command, c.Readiness.Exec.Command, c.Liveness.Exec.Command, check)
	}
	env := map[string]string{}
	for _, e := range c.Env {
		env[e.Name] = e.Value
	}
	cmd := commands(t)[p.Name]
	fits(t, cmd, env, c.Args)
	graceful(t, cmd, fmt.Sprintf("%ds", pod.Grace))
	mounts := map[string]string{}
	for _, m := range c.Mounts {
		mounts[m.Name] = m.Path
	}
	for _, v := range pod.Volumes {
		switch {
		case v.PVC.ClaimName != "":
			if v.PVC.ClaimName != objects["PersistentVolumeClaim"].Metadata.Name || mounts[v.Name] != oci.StateRoot {
				t.Errorf("claim %s at %s", v.PVC.ClaimName, mounts[v.Name])
			}
		case v.Secret.SecretName != objects["Secret"].Metadata.Name || mounts[v.Name]+"/token" != env["SALLYWAY_TOKEN_FILE"]:
			t.Errorf("secret %s at %s", v.Secret.SecretName, mounts[v.Name])
		}
	}
}
