-- The store of `limits.store`, inside Redis or Valkey: one call, one step, on the server's clock.
-- The arithmetic is that of limits/bucket.py, line for line; comments there.
-- KEYS[1]: prefix, in braces, so that all keys lie on one node of a cluster.
-- ARGV[1]: operation; ARGV[2]: its arguments, packed.

local SLOT, NEAR, FAR, GRACE, HORIZON, SETBACK = 0.125, 30, 8, 6, 600, 10
local EPSILON = 1e-6
local prefix, op, args = KEYS[1], ARGV[1], cmsgpack.unpack(ARGV[2])
local time = redis.call('TIME')
local now = args.now or (time[1] + time[2] / 1e6)
local leases = prefix .. ':leases'

local function ordered(map)
  local keys = {}
  for key in pairs(map) do keys[#keys + 1] = key end
  table.sort(keys)
  return keys
end

local function fill(a, b, at)
  if at > a.at then
    a.level = math.min(b.burst, a.level + b.rate * (at - a.at))
    a.at = at
  end
end

local function advance(a, b)
  if now < a.at - SETBACK then
    a.at, a.starts, a.units, a.after, a.held = now, {}, {}, {}, {}
  end
  while a.starts[1] and a.starts[1] * SLOT <= now do
    local slot = table.remove(a.starts, 1)
    local units = table.remove(a.units, 1)
    table.remove(a.after, 1)
    fill(a, b, slot * SLOT)
    a.level = a.level - units
    a.held[slot] = (a.held[slot] or 0) + units
  end
  fill(a, b, now)
  for _, slot in ipairs(ordered(a.held)) do
    if (slot + 1) * SLOT + GRACE <= now then
      local owed = math.min(a.held[slot], math.max(0, -a.level))
      a.level = a.level + owed
      a.spare = math.min(b.burst, a.spare + a.held[slot] - owed)
      a.held[slot] = nil
    end
  end
  if a.spare > 0 and not a.starts[1] then
    a.level = math.min(b.burst, a.level + a.spare)
    a.spare = 0
  end
end

local function project(a, b, level, in_debt)
  if level < -EPSILON and not in_debt then return nil end
  local at, after = a.at, {}
  for i, slot in ipairs(a.starts) do
    level = math.min(b.burst, level + b.rate * (slot * SLOT - at)) - a.units[i]
    if level < -EPSILON and not in_debt then return nil end
    after[i], at = level, slot * SLOT
  end
  return after
end

local function fits(a, b, units)
  units = units - a.spare
  return units <= 0 or project(a, b, a.level - units, false) ~= nil
end

local function take_units(a, b, units)
  local spare = math.min(a.spare, units)
  a.spare = a.spare - spare
  a.level = a.level - (units - spare)
  if a.starts[1] then a.after = project(a, b, a.level, true) end
end

local function charge(a, b, units)
  if units > 0 then
    take_units(a, b, units)
  else
    a.level = math.min(b.burst, a.level - units)
  end
end

local function earliest(a, b, units, from)
  local count = #a.starts
  local index = count
  while index > 0 and a.after[index] >= units do index = index - 1 end
  while index < count and a.starts[index + 1] <= from do index = index + 1 end
  while true do
    local level, at = a.level, a.at
    if index > 0 then level, at = a.after[index], a.starts[index] * SLOT end
    local full = at + math.max(0, units - level) / b.rate
    local slot = math.max(from, math.ceil(full / SLOT - EPSILON))
    if slot * SLOT > a.at + NEAR then slot = math.ceil(slot / FAR) * FAR end
    if index == count or slot < a.starts[index + 1] then return slot end
    index = index + 1
  end
end

local function promise_units(a, b, slot, units)
  local index, before = 1, 0
  while a.starts[index] and a.starts[index] < slot do index = index + 1 end
  if a.starts[index] == slot then
    before = a.units[index]
    a.units[index] = before + units
  else
    local level, at = a.level, a.at
    if index > 1 then level, at = a.after[index - 1], a.starts[index - 1] * SLOT end
    table.insert(a.starts, index, slot)
    table.insert(a.units, index, units)
    table.insert(a.after, index, math.min(b.burst, level + b.rate * (slot * SLOT - at)))
  end
  for later = index, #a.after do a.after[later] = a.after[later] - units end
  return before
end

local accounts = {}

local function open(b)
  if not accounts[b.name] then
    local packed = redis.call('GET', prefix .. ':b:' .. b.name)
    local a = packed and cmsgpack.unpack(packed)
      or {level = b.burst, spare = 0, at = now, starts = {}, units = {}, after = {}, held = {}}
    advance(a, b)
    accounts[b.name] = {a = a, b = b}
  end
  return accounts[b.name].a
end

local function save()
  for name, entry in pairs(accounts) do
    local a, b = entry.a, entry.b
    local ends = now + (b.burst - a.level) / b.rate
    if a.starts[1] then ends = math.max(ends, (a.starts[#a.starts] + 1) * SLOT + GRACE) end
    for slot in pairs(a.held) do ends = math.max(ends, (slot + 1) * SLOT + GRACE) end
    local kept = math.ceil((ends - now + 60) * 1000)
    redis.call('SET', prefix .. ':b:' .. name, cmsgpack.pack(a), 'PX', string.format('%d', kept))
  end
end

local function answer(units, culprit, retry, promised)
  local levels = {}
  for i, b in ipairs(args.buckets) do levels[i] = open(b).level + open(b).spare end
  save()
  return cmsgpack.pack({
    granted = culprit == nil, units = units, levels = levels,
    culprit = (culprit or 0) - 1, retry_after_s = retry or 0, promised = promised or false,
  })
end

local function record(id) return prefix .. ':r:' .. id end

local function keep(id, reservation)
  local kept = string.format('%d', math.ceil(args.lease * 1000) + 3600000)
  redis.call('SET', record(id), cmsgpack.pack(reservation), 'PX', kept)
  redis.call('ZADD', leases, string.format('%.17g', now + args.lease), id)
end

local function reservation_of(id)
  local packed = redis.call('GET', record(id))
  return packed and cmsgpack.unpack(packed)
end

local function settle(id, used)
  local reservation = reservation_of(id)
  redis.call('ZREM', leases, id)
  if not reservation then return end
  redis.call('DEL', record(id))
  used = used or reservation.used
  for i, b in ipairs(reservation.buckets) do
    charge(open(b), b, used[i] - reservation.units[i])
  end
end

local function reserve(units)
  local used = {}
  for i, b in ipairs(args.buckets) do used[i] = b.counts and units[i] or 0 end
  keep(args.id, {buckets = args.buckets, units = units, used = used})
  return answer(units)
end

local function nothing()
  local zeros = {}
  for i in ipairs(args.buckets) do zeros[i] = 0 end
  return zeros
end

local function promise(culprit)
  local tickets = prefix .. ':t:' .. args.fingerprint
  local first = redis.call('ZRANGE', tickets, 0, 0, 'WITHSCORES')
  if args.again and first[2] then
    return answer(nothing(), culprit, math.max(0, first[2] * SLOT - now), true)
  end
  local slot = math.floor(now / SLOT) + 1
  local agreed, index = 0, 1
  while agreed < #args.buckets and slot * SLOT - now <= HORIZON do
    local wanted, b = slot, args.buckets[index]
    if args.units[index] > 0 then slot = earliest(open(b), b, args.units[index], slot) end
    agreed = slot == wanted and agreed + 1 or 1
    index = index % #args.buckets + 1
  end
  local retry = slot * SLOT - now
  if retry > HORIZON then return answer(nothing(), culprit, retry, false) end
  for i, b in ipairs(args.buckets) do
    local before = promise_units(open(b), b, slot, args.units[i])
    if i == culprit then
      local width = slot * SLOT <= now + NEAR and SLOT or SLOT * FAR
      retry = retry + width * before / math.max(b.rate * width, before + args.units[i])
    end
  end
  redis.call('ZADD', tickets, slot, cmsgpack.pack({units = args.units, id = args.id}))
  redis.call('EXPIRE', tickets, HORIZON + 60)
  return answer(nothing(), culprit, retry, true)
end

local function impossible()
  for i, b in ipairs(args.buckets) do
    if args.units[i] > b.burst then return i end
  end
end

local function refusing(units)
  for i, b in ipairs(args.buckets) do
    if not fits(open(b), b, units[i]) then return i end
  end
end

local function take()
  local known = reservation_of(args.id)
  if known then return answer(known.units) end
  if impossible() then return answer(nothing(), impossible(), math.huge) end
  local tickets = prefix .. ':t:' .. args.fingerprint
  redis.call('ZREMRANGEBYSCORE', tickets, '-inf', string.format('%.17g', (now - GRACE) / SLOT - 1))
  local first = redis.call('ZRANGE', tickets, 0, 0, 'WITHSCORES')
  if first[1] and first[2] * SLOT <= now then
    local slot, units = tonumber(first[2]), cmsgpack.unpack(first[1]).units
    if #units == #args.units then
      redis.call('ZREM', tickets, first[1])
      for i, b in ipairs(args.buckets) do
        local held = open(b).held
        local left = (held[slot] or 0) - units[i]
        held[slot] = left > EPSILON and left or nil
      end
      return reserve(units)
    end
  end
  local culprit = refusing(args.units)
  if culprit then return promise(culprit) end
  for i, b in ipairs(args.buckets) do take_units(open(b), b, args.units[i]) end
  return reserve(args.units)
end

local function change()
  local reservation = reservation_of(args.id)
  if not reservation then return take() end
  local more = {}
  for i, units in ipairs(args.units) do more[i] = units - reservation.units[i] end
  local never = impossible()
  local culprit = never or refusing(more)
  if culprit then
    settle(args.id, nothing())
    if never then return answer(nothing(), never, math.huge) end
    return promise(culprit)
  end
  for i, b in ipairs(args.buckets) do charge(open(b), b, more[i]) end
  reservation.units = args.units
  keep(args.id, reservation)
  return answer(args.units)
end

local function renew()
  for id, used in pairs(args.used) do
    local reservation = reservation_of(id)
    if reservation then
      for i, b in ipairs(reservation.buckets) do
        local over = used[i] - reservation.units[i]
        if over > 0 then
          take_units(open(b), b, over)
          reservation.units[i] = used[i]
        end
      end
      reservation.used = used
      keep(id, reservation)
    end
  end
  save()
end

if op == 'renew' then return renew() end
if op == 'settle' then
  settle(args.id, args.used)
  return save()
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'LIMIT', 0, 8)) do
  settle(id)
end
if op == 'take' then return take() end
return change()
