//go:build !race

package platform

// crowd is how many nodes come back at once in TestEverybodyComesBack.
const crowd = 1000
