//go:build !race

package tcplb

const raceDetector = false
