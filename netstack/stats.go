package netstack

import "sync/atomic"

// counters are the counters of a stack.
type counters struct {
	packetsIn, bytesIn, packetsOut, bytesOut atomic.Uint64
	malformed, badChecksum, badSource        atomic.Uint64
	ignored, passed, echoed, injected        atomic.Uint64
	writeErrors                              atomic.Uint64

	tcpRequests, tcpAccepted, tcpRejected, tcpFailed, tcpOverLimit atomic.Uint64
	tcpFlows, tcpDials                                             atomic.Int64

	udpFlowsTotal, udpRejected, udpOverLimit, udpQueueFull atomic.Uint64
	udpFlows                                               atomic.Int64
}

// Stats is what a stack has counted since it was made. Packets are as the device carries them: up to 64 KiB.
type Stats struct {
	PacketsIn, BytesIn, PacketsOut, BytesOut uint64

	Malformed   uint64 // dropped: headers that make no sense
	BadChecksum uint64 // dropped
	BadSource   uint64 // dropped: Config.Sources said no
	Ignored     uint64 // dropped: multicast, neighbour discovery, ICMP errors about UDP
	Passed      uint64 // given to HandlePacket
	Echoed      uint64 // echo requests answered here
	Injected    uint64 // packets of Inject
	WriteErrors uint64 // packets that the device did not take

	TCPRequests  uint64 // connections given to HandleTCP
	TCPAccepted  uint64
	TCPRejected  uint64
	TCPFailed    uint64 // accepted, but the app had gone
	TCPOverLimit uint64 // SYNs dropped because of a limit
	TCPFlows     int64  // open now
	TCPDials     int64  // undecided now

	UDPFlowsTotal uint64 // associations given to HandleUDP
	UDPRejected   uint64
	UDPOverLimit  uint64 // datagrams dropped because of Config.UDPFlows
	UDPQueueFull  uint64 // datagrams dropped because their flow was slow
	UDPFlows      int64  // open now
}

// Stats returns the counters.
func (s *Stack) Stats() Stats {
	c := &s.stats
	return Stats{
		PacketsIn: c.packetsIn.Load(), BytesIn: c.bytesIn.Load(),
		PacketsOut: c.packetsOut.Load(), BytesOut: c.bytesOut.Load(),
		Malformed: c.malformed.Load(), BadChecksum: c.badChecksum.Load(), BadSource: c.badSource.Load(),
		Ignored: c.ignored.Load(), Passed: c.passed.Load(), Echoed: c.echoed.Load(), Injected: c.injected.Load(),
		WriteErrors: c.writeErrors.Load(),
		TCPRequests: c.tcpRequests.Load(), TCPAccepted: c.tcpAccepted.Load(), TCPRejected: c.tcpRejected.Load(),
		TCPFailed: c.tcpFailed.Load(), TCPOverLimit: c.tcpOverLimit.Load(),
		TCPFlows: c.tcpFlows.Load(), TCPDials: c.tcpDials.Load(),
		UDPFlowsTotal: c.udpFlowsTotal.Load(), UDPRejected: c.udpRejected.Load(), UDPOverLimit: c.udpOverLimit.Load(),
		UDPQueueFull: c.udpQueueFull.Load(), UDPFlows: c.udpFlows.Load(),
	}
}
