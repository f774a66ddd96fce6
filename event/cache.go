package event

// cache remembers what was made of texts, by the text. When it is full, what was not
// asked for since it was half full is forgotten.
type cache[V any] struct {
	max        int // bytes of the texts, at most twice
	young, old map[string]V
	size       int // of the young
}

func (c *cache[V]) get(text []byte) (V, bool) {
	if v, ok := c.young[string(text)]; ok {
		return v, true
	}
	v, ok := c.old[string(text)]
	if ok {
		c.put(text, v)
	}
	return v, ok
}

// entryCost is about what an entry takes beside its text.
const entryCost = 64

func (c *cache[V]) put(text []byte, v V) {
	if len(text) > c.max/8 {
		return // of a file that somebody made
	}
	if c.young == nil || c.size > c.max {
		c.old, c.young, c.size = c.young, map[string]V{}, 0
	}
	c.young[string(text)] = v
	c.size += len(text) + entryCost
}
