package statuspage

import (
	"math"
	"strconv"
	"time"
)

// A chart is a line over the time of the history, in a box of these units.
const (
	chartWidth  = 240
	chartHeight = 40
	chartPoints = chartWidth / 2 // at most
)

// chart is a curve with what there is to say of it.
type chart struct {
	Title     string
	Line      string // an SVG path
	Area      string // the same, closed at the bottom
	Now, Peak string
	From      string // how far back it goes
	Bad       bool   // of what should not be
}

// draw makes a chart of the values of a history. Several that fall together are
// shown by the highest. Where nothing was recorded the line is broken.
func draw(title string, history []Moment, at time.Time, window time.Duration, value func(Moment) float64, show func(float64) string) chart {
	c := chart{Title: title, From: minutes(window), Now: "–", Peak: "–"}
	if len(history) == 0 {
		return c
	}
	var points [chartPoints]float64
	for i := range points {
		points[i] = math.NaN()
	}
	peak := 0.0
	for _, m := range history {
		peak = max(peak, value(m))
		i := chartPoints - 1 - int(float64(chartPoints)*float64(at.Sub(m.At))/float64(window))
		if i >= 0 && i < chartPoints && !(points[i] >= value(m)) {
			points[i] = value(m)
		}
	}
	c.Now, c.Peak = show(value(history[len(history)-1])), show(peak)
	c.trace(points[:], peak)
	return c
}

// reach is how many points may be missing before the line is broken: a recorder
// may be late.
const reach = 3

func (c *chart) trace(points []float64, peak float64) {
	var line, area []byte
	first, last := -1, -1
	closeArea := func() {
		if first >= 0 {
			area = append(area, 'V')
			area = strconv.AppendInt(area, chartHeight, 10)
			area = append(area, 'H')
			area = strconv.AppendInt(area, int64(first*2), 10)
			area = append(area, 'Z')
		}
	}
	for i, v := range points {
		if math.IsNaN(v) {
			continue
		}
		command := byte('L')
		if last < 0 || i-last > reach {
			closeArea()
			first, command = i, 'M'
		}
		last = i
		y := float64(chartHeight - 1)
		if peak > 0 {
			y -= v / peak * (chartHeight - 3)
		}
		line = appendPoint(line, command, i*2, y)
		area = appendPoint(area, command, i*2, y)
	}
	closeArea()
	c.Line, c.Area = string(line), string(area)
}

func appendPoint(path []byte, command byte, x int, y float64) []byte {
	path = append(path, command)
	path = strconv.AppendInt(path, int64(x), 10)
	path = append(path, ' ')
	return strconv.AppendFloat(path, math.Round(y*10)/10, 'f', -1, 64)
}

// leastSpan is how much time the charts show at least.
const leastSpan = 2 * time.Minute

// span is how far back the charts go: as far as there is anything to see.
func (p *Page) span() time.Duration {
	oldest := leastSpan
	for i := range p.Pools {
		if h := p.Pools[i].History; len(h) > 0 {
			oldest = max(oldest, p.At.Sub(h[0].At))
		}
	}
	return min((oldest + time.Minute - 1).Truncate(time.Minute), p.Window)
}

// charts are those of a pool.
func (p *Pool) charts(at time.Time, window time.Duration) []chart {
	of := func(title string, value func(Moment) float64, show func(float64) string) chart {
		return draw(title, p.History, at, window, value, show)
	}
	list := []chart{
		of("Open connections", func(m Moment) float64 { return m.Open }, func(v float64) string { return amount(uint64(v)) }),
		of("New connections", func(m Moment) float64 { return m.New }, rate),
		of("From clients", func(m Moment) float64 { return m.Received }, flow),
		of("To clients", func(m Moment) float64 { return m.Sent }, flow),
	}
	for _, m := range p.History {
		if m.Refused > 0 {
			c := of("Turned away", func(m Moment) float64 { return m.Refused }, rate)
			c.Bad = true
			return append(list, c)
		}
	}
	return list
}
