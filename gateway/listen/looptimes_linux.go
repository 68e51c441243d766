package listen

// dueTimes is a heap: when something may have to be done about each connection, the first in front. A time here is not
// later than the connection's own; it is corrected when it comes, and not at each query.
type dueTimes []dueTime

type dueTime struct {
	at int64
	c  *loopConn
}

// push adds c.
func (h *dueTimes) push(c *loopConn, at int64) {
	*h = append(*h, dueTime{at, c})
	h.up(len(*h) - 1)
}

// hasten makes c's time at, if that is earlier.
func (h dueTimes) hasten(c *loopConn, at int64) {
	if i := int(c.place); at < h[i].at {
		h[i].at = at
		h.up(i)
	}
}

// delay makes the first time at, which is later.
func (h dueTimes) delay(at int64) {
	h[0].at = at
	h.down(0)
}

// remove takes c out.
func (h *dueTimes) remove(c *loopConn) {
	i, last := int(c.place), len(*h)-1
	moved := (*h)[last]
	(*h)[last] = dueTime{}
	*h = (*h)[:last]
	c.place = -1
	if i < last {
		(*h)[i] = moved
		h.down(i)
		h.up(int(moved.c.place))
	}
}

func (h dueTimes) up(i int) {
	e := h[i]
	for i > 0 && e.at < h[(i-1)/2].at {
		h[i] = h[(i-1)/2]
		h[i].c.place = int32(i)
		i = (i - 1) / 2
	}
	h[i] = e
	e.c.place = int32(i)
}

func (h dueTimes) down(i int) {
	e := h[i]
	for {
		k := 2*i + 1
		if k+1 < len(h) && h[k+1].at < h[k].at {
			k++
		}
		if k >= len(h) || h[k].at >= e.at {
			break
		}
		h[i] = h[k]
		h[i].c.place = int32(i)
		i = k
	}
	h[i] = e
	e.c.place = int32(i)
}
