//go:build !linux

package gateway

const segmentSpace = 0

func (u *udpFlow) offload() {}

func runSize([]byte) int { return 0 }

func segmentControl([]byte, int) []byte { return nil }

func tooLarge(error) bool { return false }
