-- Every atomic verb on the messages of a Redis broker. KEYS: unacked, its index; ARGV[1] is the verb.
--
-- A message waits in the list of its queue, bytes as they were published. Whoever takes it holds a claim: the bytes are
-- in `unacked` under a tag of this delivery alone, "queue|consumer.number", and the index says when the claim runs out,
-- by this server's clock. No moment passes in which a message is in neither.
--
-- The first write of each verb is one that a server without memory allows (then the others are allowed as well), so
-- that what is there can be worked off when nothing more can be put in.

local UNACKED, INDEX = KEYS[1], KEYS[2]
local call = redis.call

local function now()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function ring(queue) -- wake one of those who wait; a bell that rings already is left as it is
  call('LPUSH', queue .. '.bell', '1')
  call('LTRIM', queue .. '.bell', 0, 0)
end

local function restore(tag) -- back to the head of its queue, as it was
  local raw = call('HGET', UNACKED, tag)
  call('ZREM', INDEX, tag)
  if not raw then return 0 end
  call('HDEL', UNACKED, tag)
  local queue = string.match(tag, '^(.*)|[^|]*$')
  call('RPUSH', queue, raw)
  ring(queue)
  return 1
end

local verbs = {}

-- fetch: claim_ms, limit, consumer, number of its next delivery, then the queues by priority.
-- Answers {tag, queue, bytes, ...}.
function verbs.fetch()
  local limit, consumer, number = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
  local taken = {}
  local until_ms = now() + tonumber(ARGV[2])
  for i = 6, #ARGV do
    local queue = ARGV[i]
    while #taken < 3 * limit do
      local raw = call('RPOP', queue)
      if not raw then break end
      local tag = string.format('%s|%s.%d', queue, consumer, number)
      number = number + 1
      call('HSET', UNACKED, tag, raw)
      call('ZADD', INDEX, until_ms, tag)
      taken[#taken + 1] = tag
      taken[#taken + 1] = queue
      taken[#taken + 1] = raw
    end
    if #taken >= 3 * limit and call('EXISTS', queue) == 1 then ring(queue) end
  end
  return taken
end

-- ack: tags. They are done with.
function verbs.ack()
  call('ZREM', INDEX, unpack(ARGV, 2))
  return call('HDEL', UNACKED, unpack(ARGV, 2))
end

-- give_back: tag. Answers 1 if the message was still held under it.
function verbs.give_back() return restore(ARGV[2]) end

-- tend: claim_ms, most to restore, then the tags whose claims are renewed. Gives back what nobody has renewed in time;
-- answers how much.
function verbs.tend()
  local time = now()
  for i = 4, #ARGV do call('ZADD', INDEX, 'XX', time + tonumber(ARGV[2]), ARGV[i]) end
  local restored = 0
  for _, tag in ipairs(call('ZRANGEBYSCORE', INDEX, '-inf', time, 'LIMIT', 0, ARGV[3])) do
    restored = restored + restore(tag)
  end
  return restored
end

-- set_aside: tag, list, record. What was held under the tag cannot be read: its bytes are in the record.
function verbs.set_aside()
  call('ZREM', INDEX, ARGV[2])
  if call('HDEL', UNACKED, ARGV[2]) == 1 then call('LPUSH', ARGV[3], ARGV[4]) end
end

-- held: answers the tags of all deliveries in work, and the lengths of the queues in ARGV, as of one moment.
function verbs.held()
  local lengths = {}
  for i = 2, #ARGV do lengths[#lengths + 1] = call('LLEN', ARGV[i]) end
  return { call('ZRANGE', INDEX, 0, -1), lengths }
end

return verbs[ARGV[1]]()
