package tunnel

import (
	"time"

	"github.com/quic-go/quic-go"
)

// QUICStats is what QUIC counts at one end of a session. What is lost is what this end sent.
type QUICStats struct {
	PacketsSent, PacketsReceived uint64
	// PacketsLost falls again when a packet arrives after it was declared lost.
	PacketsLost          uint64
	BytesSent, BytesLost uint64
	// CongestionWindow is the sender's on the active path, in bytes.
	CongestionWindow uint64
	// RTT is smoothed, MinRTT the smallest on the active path.
	RTT, MinRTT time.Duration
}

func quicStats(c *quic.Conn) QUICStats {
	q := c.ConnectionStats()
	return QUICStats{
		PacketsSent: q.PacketsSent, PacketsReceived: q.PacketsReceived, PacketsLost: q.PacketsLost, BytesSent: q.BytesSent, BytesLost: q.BytesLost,
		CongestionWindow: q.CongestionWindow, RTT: q.SmoothedRTT, MinRTT: q.MinRTT,
	}
}

// QUIC is what QUIC counts at the client's end.
func (s *Session) QUIC() QUICStats { return quicStats(s.conn) }

// QUIC is what QUIC counts at the gateway's end of the session that Peer.Session names; ok is false when it is over. Path is the session's
// active one.
func (s *Server) QUIC(session uint64) (stats QUICStats, path LinkInfo, ok bool) {
	for _, p := range s.list() {
		if p.peer.Session == session {
			return quicStats(p.conn), p.info().Path, true
		}
	}
	return stats, path, false
}
