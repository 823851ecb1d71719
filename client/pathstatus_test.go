package client

import (
	"strings"
	"testing"
	"time"

	"sallyway/direct"
	"sallyway/stun"
	"sallyway/tunnel"
)

func TestStatusOfPaths(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.Local)
	info := tunnel.PathInfo{
		Active: tunnel.PathStatus{
			Link: &direct.Link{}, Info: tunnel.LinkInfo{Name: "ams-2 udp"}, State: tunnel.Alive, Since: at, Probes: stun.PathStats{RTT: 20 * time.Millisecond, Loss: 1.0 / 64},
		},
		Standby: tunnel.PathStatus{
			Link: &direct.Link{}, Info: tunnel.LinkInfo{Name: "fra-1 udp"}, State: tunnel.Suspect, Probes: stun.PathStats{RTT: 31 * time.Millisecond, Loss: 0.31}, HeldUntil: at,
		},
	}
	var b strings.Builder
	renderPaths(&b, GatewayStatus{
		Moves: 1, LastMove: "left fra-1 udp: 31 % of probes lost, ams-2 udp 0 %", LastMoveAt: at, Paths: reportPaths(info),
	})
	want := `  active   ams-2 udp alive since 2026-01-02 03:04:05, RTT 20ms, 2 % of probes lost
  standby  fra-1 udp suspect, RTT 31ms, 31 % of probes lost; it was bad and is not gone back to before 03:04:05
  moved    at 2026-01-02 03:04:05: left fra-1 udp: 31 % of probes lost, ams-2 udp 0 %
`
	if b.String() != want {
		t.Errorf("status:\n%swant\n%s", b.String(), want)
	}
	if n := len(reportPaths(tunnel.PathInfo{})); n != 1 {
		t.Errorf("%d paths of a session without a standby", n)
	}
}

// A move that the session made by itself is counted by its cause, one of the client's by its reason.
func TestMovesAreCountedByCause(t *testing.T) {
	s := NewSessions(SessionsConfig{})
	var seen tunnel.PathInfo
	info := tunnel.PathInfo{Moves: 3, LastReason: "the relay is draining", Causes: map[tunnel.MoveCause]uint64{"loss": 1, "dead": 1, "owner": 1}}
	s.noteMoves(info, &seen)
	s.noteMoves(info, &seen)
	got := metricsOf(t, s.moves)
	for _, reason := range []string{"lossy", "unanswered", "draining"} {
		if n := got["sallyway_path_moves_total{reason="+reason+"}"]; n != 1 {
			t.Errorf("%v moves for reason %s in %v", n, reason, got)
		}
	}
}
