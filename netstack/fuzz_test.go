package netstack

import (
	"context"
	"testing"
)

// FuzzReceive feeds a running stack whatever a device may deliver.
func FuzzReceive(f *testing.F) {
	with := func(h vnetHeader, b []byte) []byte {
		hdr := make([]byte, vnetHeaderLen)
		h.put(hdr)
		return append(hdr, b...)
	}
	for _, s := range []string{ping4, udp4, udp6, frag4, frag6, firstFrag6, atomic6} {
		f.Add(with(vnetHeader{}, unhex(f, s)))
		f.Add(with(vnetHeader{flags: vnetNeedsCsum, csumStart: 20, csumOffset: 6}, unhex(f, s)))
	}
	f.Add(with(vnetHeader{flags: vnetDataValid}, synPacket(1)))
	f.Add(with(vnetHeader{}, AppendTooBig(nil, synPacket(1), app4, 1300)))
	dev := newFakeDevice(vnetHeaderLen)
	dev.discards = true
	s, err := New(Config{
		Device:       dev,
		TCPFlows:     100,
		HandleTCP:    func(_ context.Context, r *TCPRequest) { r.Reject(Unreachable) },
		HandleUDP:    func(_ context.Context, u *UDPFlow) { u.Reject(Refused) },
		HandlePacket: func([]byte) {},
	})
	if err != nil {
		f.Fatal(err)
	}
	ran := make(chan error, 1)
	go func() { ran <- s.Run(context.Background()) }()
	f.Cleanup(func() {
		s.Close()
		if err := <-ran; err != nil {
			f.Error(err)
		}
	})
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > vnetHeaderLen+maxPacket {
			return
		}
		before := s.Stats().PacketsIn + s.Stats().Malformed
		dev.in <- b
		wait(t, func() bool { return s.Stats().PacketsIn+s.Stats().Malformed > before })
	})
}
