//go:build race

package platform

// crowd is how many nodes come back at once in TestEverybodyComesBack: fewer under the race detector, which makes each ten times as dear.
const crowd = 150
