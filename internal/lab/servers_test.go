package lab_test

import (
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"sallyway/internal/lab"
)

// program skips where a program is missing, which CI does not accept.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := lab.Program(name)
	var missing *lab.MissingError
	if errors.As(err, &missing) && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRealServers(t *testing.T) {
	psql, ssh := program(t, "psql"), program(t, "ssh")
	program(t, "iperf3")
	program(t, "postgres")
	program(t, "sshd")
	l := newLab(t, lab.Config{Raw: true})
	ctx := soon(t, time.Minute)
	if _, err := l.Private.Postgres(ctx, netip.AddrPortFrom(lab.RawAddr, 5432)); err != nil {
		t.Fatal(err)
	}
	r, err := l.Client.Run(ctx, psql, "-h", lab.RawAddr.String(), "-U", "postgres", "-Atc", "select 6*7")
	if err != nil || strings.TrimSpace(r.Stdout) != "42" {
		t.Errorf("psql: %q, %v", r.Stdout, err)
	}
	s, err := l.Private.SSHD(ctx, netip.AddrPortFrom(lab.RawAddr, 22), lab.RawAddr.String())
	if err != nil {
		t.Fatal(err)
	}
	r, err = l.Client.Run(ctx, ssh, "-i", s.Key, "-o", "UserKnownHostsFile="+s.KnownHosts, "-o", "BatchMode=yes", "root@"+lab.RawAddr.String(), "echo $((6*7))")
	if err != nil || strings.TrimSpace(r.Stdout) != "42" {
		t.Errorf("ssh: %q, %v\n%s", r.Stdout, err, s.Log.Tail(9))
	}
	if _, err := l.Private.Iperf3Server(ctx, 5201); err != nil {
		t.Fatal(err)
	}
	res, err := l.Client.Iperf3(ctx, lab.IperfRun{Addr: lab.RawAddr.String(), Port: 5201, Time: time.Second})
	if err != nil || res.BitsPerSecond < 1e6 {
		t.Errorf("iperf3: %+v, %v", res, err)
	}
	t.Logf("raw TCP: %.1f Gbit/s", res.BitsPerSecond/1e9)
}
