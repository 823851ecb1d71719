package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// MissingError says that a program which the lab does not bring along is not installed.
type MissingError struct{ Program, Package string }

func (e *MissingError) Error() string {
	return fmt.Sprintf("%s is not installed: apt-get install %s", e.Program, e.Package)
}

// packages are the Debian packages of the programs that tests run.
var packages = map[string]string{
	"curl": "curl", "dig": "bind9-dnsutils", "iperf3": "iperf3", "initdb": "postgresql", "openssl": "openssl", "ping": "iputils-ping",
	"postgres": "postgresql", "psql": "postgresql-client", "ssh": "openssh-client", "ssh-keygen": "openssh-client",
	"sshd": "openssh-server", "turnserver": "coturn", "turnutils_peer": "coturn", "turnutils_uclient": "coturn",
	"tinyproxy": "tinyproxy-bin", "wg": "wireguard-tools", "nebula-cert": "nebula",
}

// Program finds a program, also where only root's PATH or Debian's PostgreSQL has it. The error is a *MissingError.
func Program(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return filepath.Abs(path)
	}
	dirs := []string{"/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"}
	versions, _ := filepath.Glob("/usr/lib/postgresql/*/bin") // the pattern is good
	slices.Reverse(versions)
	for _, d := range append(dirs, versions...) {
		path := filepath.Join(d, name)
		if fi, err := os.Stat(path); err == nil && fi.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	pkg := packages[name]
	if pkg == "" {
		pkg = name
	}
	return "", &MissingError{name, pkg}
}

// Iperf3Server starts iperf3 -s on a port of all the host's addresses.
func (h *Host) Iperf3Server(ctx context.Context, port uint16) (*Proc, error) {
	path, err := Program("iperf3")
	if err != nil {
		return nil, err
	}
	name := fmt.Sprintf("iperf3-%d", port)
	p, err := h.Start(Spec{Name: name, Args: []string{path, "-s", "--forceflush", "-p", strconv.Itoa(int(port))}, Grace: time.Second})
	if err != nil {
		return nil, err
	}
	return p, p.WaitReady(ctx, 0, "Server listening")
}

// Iperf3ServerAt is Iperf3Server on one of the host's addresses. UDP wants that on a host with several: a server on all of
// them answers from the first.
func (h *Host) Iperf3ServerAt(ctx context.Context, addr netip.AddrPort) (*Proc, error) {
	path, err := Program("iperf3")
	if err != nil {
		return nil, err
	}
	p, err := h.Start(Spec{
		Name: fmt.Sprintf("iperf3-%s-%d", addr.Addr(), addr.Port()), Grace: time.Second,
		Args: []string{path, "-s", "--forceflush", "-B", addr.Addr().String(), "-p", strconv.Itoa(int(addr.Port()))},
	})
	if err != nil {
		return nil, err
	}
	return p, p.WaitReady(ctx, 0, "Server listening")
}

// IperfRun is a run of iperf3's client.
type IperfRun struct {
	Addr  string // address or name
	Port  uint16
	Time  time.Duration // whole seconds
	Down  bool          // the server sends
	Flows int           // zero is one
	UDP   bool
	Rate  string // such as 50M; for UDP
	CC    string // congestion control of TCP at both ends; empty is the hosts' own
}

// IperfResult is what iperf3 found, as the receiver saw it.
type IperfResult struct {
	BitsPerSecond float64
	Bytes         int64
	LostPercent   float64 // UDP
	Jitter        float64 // UDP, in milliseconds, as RFC 1889 counts it
	Retransmits   int     // TCP
}

// errBusy is iperf3's server still reading what an earlier run has left on its way.
var errBusy = errors.New("the server is busy running a test. try again later")

// busyWait bounds how long that may last.
const busyWait = 10 * time.Second

// Iperf3 runs iperf3's client on the host. A server that is still busy with an earlier run is asked again.
func (h *Host) Iperf3(ctx context.Context, run IperfRun) (res IperfResult, err error) {
	for end := time.Now().Add(busyWait); ; {
		res, err = h.iperf3(ctx, run)
		if !errors.Is(err, errBusy) || time.Now().After(end) || ctx.Err() != nil {
			return res, err
		}
	}
}

func (h *Host) iperf3(ctx context.Context, run IperfRun) (IperfResult, error) {
	path, err := Program("iperf3")
	if err != nil {
		return IperfResult{}, err
	}
	args := []string{path, "-c", run.Addr, "-p", strconv.Itoa(int(run.Port)), "-t", strconv.Itoa(int(run.Time.Seconds())), "-J", "--connect-timeout", "10000"}
	if run.Down {
		args = append(args, "-R")
	}
	if run.Flows > 1 {
		args = append(args, "-P", strconv.Itoa(run.Flows))
	}
	if run.UDP {
		args = append(args, "-u", "-b", run.Rate, "-l", "1200")
	}
	if run.CC != "" {
		args = append(args, "-C", run.CC)
	}
	r, err := h.Run(ctx, args...)
	var doc struct {
		Error string `json:"error"`
		End   struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
				Bytes         int64   `json:"bytes"`
			} `json:"sum_received"`
			Sent struct {
				Retransmits int `json:"retransmits"`
			} `json:"sum_sent"`
			Sum struct {
				BitsPerSecond float64 `json:"bits_per_second"`
				Bytes         int64   `json:"bytes"`
				LostPercent   float64 `json:"lost_percent"`
				Jitter        float64 `json:"jitter_ms"`
			} `json:"sum"`
		} `json:"end"`
	}
	if jsonErr := json.Unmarshal([]byte(r.Stdout), &doc); jsonErr != nil {
		return IperfResult{}, errors.Join(err, fmt.Errorf("iperf3: %w: %.300s", jsonErr, r.Stdout))
	}
	if strings.Contains(doc.Error, errBusy.Error()) {
		return IperfResult{}, fmt.Errorf("iperf3: %w", errBusy)
	}
	if doc.Error != "" {
		return IperfResult{}, fmt.Errorf("iperf3: %s", doc.Error)
	}
	if err != nil {
		return IperfResult{}, err
	}
	if sum := doc.End.Sum; run.UDP {
		return IperfResult{BitsPerSecond: sum.BitsPerSecond * (1 - sum.LostPercent/100), Bytes: sum.Bytes, LostPercent: sum.LostPercent, Jitter: sum.Jitter}, nil
	}
	return IperfResult{BitsPerSecond: doc.End.Received.BitsPerSecond, Bytes: doc.End.Received.Bytes, Retransmits: doc.End.Sent.Retransmits}, nil
}

// Postgres starts a PostgreSQL server of its own on an address. User postgres needs no password.
func (h *Host) Postgres(ctx context.Context, addr netip.AddrPort) (*Proc, error) {
	initdb, err := Program("initdb")
	if err != nil {
		return nil, err
	}
	server, err := Program("postgres")
	if err != nil {
		return nil, err
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, &MissingError{"the user postgres", "postgresql"}
	}
	uid, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	dir := h.Path("postgres")
	err = errors.Join(err1, err2, os.Mkdir(dir, 0o700), os.Chown(dir, int(uid), int(gid)))
	if err != nil {
		return nil, err
	}
	data := filepath.Join(dir, "data")
	_, err = h.RunWith(ctx, Exec{
		Args: []string{initdb, "-D", data, "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"},
		UID:  uint32(uid),
	})
	if err != nil {
		return nil, err
	}
	hba := "local all all trust\nhost all all 0.0.0.0/0 trust\nhost all all ::/0 trust\n"
	if err := os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte(hba), 0o600); err != nil {
		return nil, err
	}
	if err := os.Chown(filepath.Join(data, "pg_hba.conf"), int(uid), int(gid)); err != nil {
		return nil, err
	}
	p, err := h.Start(Spec{
		Name: "postgres", UID: uint32(uid), GID: uint32(gid),
		Args: []string{server, "-D", data, "-k", dir, "-h", addr.Addr().String(), "-p", strconv.Itoa(int(addr.Port())), "-F", "-c", "shared_buffers=16MB"},
	})
	if err != nil {
		return nil, err
	}
	return p, p.WaitReady(ctx, 0, "ready to accept connections")
}

// SSHServer is an sshd with keys of its own.
type SSHServer struct {
	*Proc
	Addr       netip.AddrPort
	Key        string // file of the private key that root may log in with
	KnownHosts string // file
}

// SSHD starts an sshd on an address. Root may log in with the key. The known hosts name the server by each of names.
func (h *Host) SSHD(ctx context.Context, addr netip.AddrPort, names ...string) (*SSHServer, error) {
	sshd, err := Program("sshd")
	if err != nil {
		return nil, err
	}
	keygen, err := Program("ssh-keygen")
	if err != nil {
		return nil, err
	}
	dir := h.Path("sshd")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	s := &SSHServer{Addr: addr, Key: filepath.Join(dir, "user"), KnownHosts: filepath.Join(dir, "known_hosts")}
	host := filepath.Join(dir, "host")
	for _, key := range []string{host, s.Key} {
		if _, err := h.Run(ctx, keygen, "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", key); err != nil {
			return nil, err
		}
	}
	pub, err := os.ReadFile(host + ".pub")
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(s.KnownHosts, []byte(strings.Join(names, ",")+" "+string(pub)), 0o644); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "config")
	text := fmt.Sprintf(`ListenAddress %s
HostKey %s
AuthorizedKeysFile %s.pub
StrictModes no
UsePAM no
UseDNS no
PidFile none
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
`, addr, host, s.Key)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	s.Proc, err = h.Start(Spec{Name: "sshd", Args: []string{sshd, "-D", "-e", "-f", config}})
	if err != nil {
		return nil, err
	}
	return s, s.WaitReady(ctx, 0, "Server listening")
}
