import { CdpError } from '../errors/index.ts'
import { readU64, writeU64 } from '../record/index.ts'
import type { DiskEntry } from '../record/index.ts'

export const STREAM_PROTOCOL = 1
export const STREAM_ALPN = 'cdp-stream/1'
export const MESSAGE_HEADER_BYTES = 8
export const MAX_FRAME_MESSAGE_BYTES = 5 * 1024 * 1024
export const MAX_OTHER_MESSAGE_BYTES = 64 * 1024

export const MessageType = { hello: 1, welcome: 2, refuse: 3, frame: 4, ack: 5, ping: 6, pong: 7, end: 8, state: 9 } as const
export type MessageType = (typeof MessageType)[keyof typeof MessageType]

export type Hello = {
  protocol: number
  /** VM id at the protected site, "101"; the agent prefixes the site's id. */
  vm: string
  vpg: string
  vms: string[]
  /** 0 asks for a new attach, else the epoch to go on with. */
  epoch: number
  disks: DiskEntry[]
  reason: string
}
export type Welcome = { epoch: number; durableSeq: number; baseComplete: boolean; /** Bytes copied, by disk number. */ syncProgress: Record<string, number>; disks: DiskEntry[] }
export type Refuse = { code: string; message: string; hint?: string }
export type StateNews = { validCheckpoint?: { id: string; atUnixMs: number } }
export type Ack = { epoch: number; durableSeq: number }

const header = (type: MessageType, lengthBytes: number): Buffer => {
  const buffer = Buffer.alloc(MESSAGE_HEADER_BYTES)
  buffer.writeUInt32LE(lengthBytes, 0)
  buffer[4] = type
  return buffer
}

/** Header of a frame message; the frame's own bytes follow by writev. */
export const frameMessageHeader = (frameBytes: number): Buffer => header(MessageType.frame, frameBytes)

const jsonMessage = (type: MessageType, value: unknown): Buffer => {
  const body = Buffer.from(JSON.stringify(value))
  if (body.length > MAX_OTHER_MESSAGE_BYTES) throw new CdpError('STREAM_PROTOCOL', 'message is too large', { context: { type, bytes: body.length } })
  return Buffer.concat([header(type, body.length), body])
}
export const helloMessage = (hello: Hello): Buffer => jsonMessage(MessageType.hello, hello)
export const welcomeMessage = (welcome: Welcome): Buffer => jsonMessage(MessageType.welcome, welcome)
export const refuseMessage = (refuse: Refuse): Buffer => jsonMessage(MessageType.refuse, refuse)
export const stateMessage = (news: StateNews): Buffer => jsonMessage(MessageType.state, news)
export const endMessage = (): Buffer => header(MessageType.end, 0)

export const ackMessage = (ack: Ack): Buffer => {
  const buffer = Buffer.alloc(MESSAGE_HEADER_BYTES + 16)
  buffer.writeUInt32LE(16, 0)
  buffer[4] = MessageType.ack
  buffer.writeUInt32LE(ack.epoch, 8)
  writeU64(buffer, ack.durableSeq, 16)
  return buffer
}

/** A ping or pong that carries one number below 2^53. */
export const echoMessage = (type: typeof MessageType.ping | typeof MessageType.pong, value: number): Buffer => {
  const buffer = Buffer.alloc(MESSAGE_HEADER_BYTES + 8)
  buffer.writeUInt32LE(8, 0)
  buffer[4] = type
  writeU64(buffer, value, 8)
  return buffer
}

const broken = (what: string): CdpError => new CdpError('STREAM_PROTOCOL', `broken ${what} message`)

export const readAck = (body: Buffer): Ack => {
  if (body.length !== 16) throw broken('ack')
  const durableSeq = readU64(body, 8)
  if (durableSeq > Number.MAX_SAFE_INTEGER) throw broken('ack')
  return { epoch: body.readUInt32LE(0), durableSeq }
}

export const readEcho = (body: Buffer): number => {
  if (body.length !== 8) throw broken('ping')
  return readU64(body, 0)
}

type Fields = Record<string, unknown>
const readJson = (body: Buffer, what: string): Fields => {
  let value: unknown
  try {
    value = JSON.parse(body.toString('utf8'))
  } catch {
    throw broken(what)
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) throw broken(what)
  return value as Fields
}
const isDisk = (value: unknown): value is DiskEntry => {
  if (typeof value !== 'object' || value === null) return false
  const { disk, key, sizeBytes } = value as Fields
  return (
    Number.isInteger(disk) && (disk as number) >= 0 && (disk as number) < 0xffff &&
    typeof key === 'string' && /^[a-z]+[0-9]+$/.test(key) &&
    Number.isSafeInteger(sizeBytes) && (sizeBytes as number) > 0 && (sizeBytes as number) % 512 === 0
  )
}
const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0
/** As long as a segment's header has room for. */
const isVmName = (value: unknown): value is string => isName(value) && value.length <= 36
const isName = (value: unknown): value is string => typeof value === 'string' && /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(value)

/** @throws CdpError STREAM_PROTOCOL */
export const readHello = (body: Buffer): Hello => {
  const json = readJson(body, 'hello')
  const { protocol, vm, vpg, vms, epoch, disks, reason } = json
  if (protocol !== STREAM_PROTOCOL) throw new CdpError('STREAM_PROTOCOL', `peer speaks stream protocol ${JSON.stringify(protocol)}, this side ${STREAM_PROTOCOL}`, { hint: 'Install the same version of pve-cdp on both sites.' })
  if (
    !isVmName(vm) || !isName(vpg) || !Array.isArray(vms) || vms.length > 1000 || !vms.every(isVmName) || !vms.includes(vm) ||
    !isCount(epoch) || !Array.isArray(disks) || disks.length === 0 || disks.length > 256 || !disks.every(isDisk) || typeof reason !== 'string'
  ) {
    throw broken('hello')
  }
  return { protocol: STREAM_PROTOCOL, vm, vpg, vms, epoch, disks, reason }
}

/** @throws CdpError STREAM_PROTOCOL */
export const readWelcome = (body: Buffer): Welcome => {
  const json = readJson(body, 'welcome')
  const { epoch, durableSeq, baseComplete, syncProgress, disks } = json
  if (
    !isCount(epoch) || epoch === 0 || !isCount(durableSeq) || typeof baseComplete !== 'boolean' || typeof syncProgress !== 'object' || syncProgress === null || Array.isArray(syncProgress) ||
    !Object.values(syncProgress).every(isCount) || !Array.isArray(disks) || !disks.every(isDisk)
  ) {
    throw broken('welcome')
  }
  return { epoch, durableSeq, baseComplete, syncProgress: syncProgress as Record<string, number>, disks }
}

/** @throws CdpError STREAM_PROTOCOL */
export const readRefuse = (body: Buffer): Refuse => {
  const { code, message, hint } = readJson(body, 'refuse')
  if (typeof code !== 'string' || typeof message !== 'string') throw broken('refuse')
  return { code, message, ...(typeof hint === 'string' ? { hint } : {}) }
}

/** @throws CdpError STREAM_PROTOCOL */
export const readStateNews = (body: Buffer): StateNews => {
  const { validCheckpoint } = readJson(body, 'state')
  if (validCheckpoint === undefined) return {}
  if (typeof validCheckpoint !== 'object' || validCheckpoint === null) throw broken('state')
  const { id, atUnixMs } = validCheckpoint as Fields
  if (typeof id !== 'string' || !isCount(atUnixMs)) throw broken('state')
  return { validCheckpoint: { id, atUnixMs } }
}
