import { CdpError } from '../errors/index.ts'
import { readU64, writeU64 } from '../record/index.ts'
import type { DiskEntry } from '../record/index.ts'
import { FIRST_GENERATION } from './generation.ts'

export const STREAM_PROTOCOL = 1
export const STREAM_ALPN = 'cdp-stream/1'
export const MESSAGE_HEADER_BYTES = 8
export const MAX_FRAME_MESSAGE_BYTES = 5 * 1024 * 1024
export const MAX_OTHER_MESSAGE_BYTES = 64 * 1024

export const MessageType = { hello: 1, welcome: 2, refuse: 3, frame: 4, ack: 5, ping: 6, pong: 7, end: 8, state: 9, hashRequest: 10, hashReply: 11 } as const
export type MessageType = (typeof MessageType)[keyof typeof MessageType]

export type Hello = {
  protocol: number
  /** VM id at the protected site, "101"; the agent prefixes the site's id. */
  vm: string
  vpg: string
  vms: string[]
  /** Of the group, as the sender has it. */
  generation: number
  /** 0 asks for a new attach, else the epoch to go on with. */
  epoch: number
  disks: DiskEntry[]
  reason: string
  /** The sender copies disks that are joining beside checkpoints; one that does not brings them with its sync. */
  joins?: true
}
export type Welcome = {
  epoch: number
  /** Of the group, as the agent has it. If it is not the hello's, what is sent does not become part of the group's history. */
  generation: number
  durableSeq: number
  baseComplete: boolean
  /** Bytes copied, by disk number. */
  syncProgress: Record<string, number>
  disks: DiskEntry[]
  /** The agent answers hashRequest. */
  hashes?: boolean
  /** The mirrors hold data already: an initial sync compares before it sends. */
  mirrorHasData?: boolean
}
export type Refuse = { code: string; message: string; hint?: string; /** FENCED, GENERATION_AHEAD: as the agent has it. */ generation?: number }
export type StateNews = {
  validCheckpoint?: { id: string; atUnixMs: number }
  /** The agent's copy is damaged: everything is to be compared, and what differs sent. */
  syncWanted?: { why: string }
}
export type Ack = { epoch: number; durableSeq: number }

/** The eight bytes before the body of a message. */
export const messageHeader = (type: MessageType, lengthBytes: number): Buffer => {
  const buffer = Buffer.alloc(MESSAGE_HEADER_BYTES)
  buffer.writeUInt32LE(lengthBytes, 0)
  buffer[4] = type
  return buffer
}

/** Header of a frame message; the frame's own bytes follow by writev. */
export const frameMessageHeader = (frameBytes: number): Buffer => messageHeader(MessageType.frame, frameBytes)

const jsonMessage = (type: MessageType, value: unknown): Buffer => {
  const body = Buffer.from(JSON.stringify(value))
  if (body.length > MAX_OTHER_MESSAGE_BYTES) throw new CdpError('STREAM_PROTOCOL', 'message is too large', { context: { type, bytes: body.length } })
  return Buffer.concat([messageHeader(type, body.length), body])
}
export const helloMessage = (hello: Hello): Buffer => jsonMessage(MessageType.hello, hello)
export const welcomeMessage = (welcome: Welcome): Buffer => jsonMessage(MessageType.welcome, welcome)
export const refuseMessage = (refuse: Refuse): Buffer => jsonMessage(MessageType.refuse, refuse)
export const stateMessage = (news: StateNews): Buffer => jsonMessage(MessageType.state, news)
export const endMessage = (): Buffer => messageHeader(MessageType.end, 0)

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
const isFields = (value: unknown): value is Fields => typeof value === 'object' && value !== null
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
const isGeneration = (value: unknown): value is number => isCount(value) && value >= FIRST_GENERATION
/** As long as a segment's header has room for. */
const isVmName = (value: unknown): value is string => isName(value) && value.length <= 36
const isName = (value: unknown): value is string => typeof value === 'string' && /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/.test(value)

/** @throws CdpError STREAM_PROTOCOL */
export const readHello = (body: Buffer): Hello => {
  const json = readJson(body, 'hello')
  const { protocol, vm, vpg, vms, generation, epoch, disks, reason, joins } = json
  if (protocol !== STREAM_PROTOCOL) throw new CdpError('STREAM_PROTOCOL', `peer speaks stream protocol ${JSON.stringify(protocol)}, this side ${STREAM_PROTOCOL}`, { hint: 'Install the same version of pve-cdp on both sites.' })
  if (
    !isVmName(vm) || !isName(vpg) || !Array.isArray(vms) || vms.length > 1000 || !vms.every(isVmName) || !vms.includes(vm) ||
    !isGeneration(generation) || !isCount(epoch) || !Array.isArray(disks) || disks.length === 0 || disks.length > 256 || !disks.every(isDisk) || typeof reason !== 'string'
  ) {
    throw broken('hello')
  }
  return { protocol: STREAM_PROTOCOL, vm, vpg, vms, generation, epoch, disks, reason, ...(joins === true ? { joins } : {}) }
}

/** @throws CdpError STREAM_PROTOCOL */
export const readWelcome = (body: Buffer): Welcome => {
  const json = readJson(body, 'welcome')
  const { epoch, generation, durableSeq, baseComplete, syncProgress, disks, hashes, mirrorHasData } = json
  if (
    !isCount(epoch) || epoch === 0 || !isGeneration(generation) || !isCount(durableSeq) || typeof baseComplete !== 'boolean' || typeof syncProgress !== 'object' || syncProgress === null || Array.isArray(syncProgress) ||
    !Object.values(syncProgress).every(isCount) || !Array.isArray(disks) || !disks.every(isDisk)
  ) {
    throw broken('welcome')
  }
  return { epoch, generation, durableSeq, baseComplete, syncProgress: syncProgress as Record<string, number>, disks, ...(hashes === true ? { hashes } : {}), ...(mirrorHasData === true ? { mirrorHasData } : {}) }
}

/** @throws CdpError STREAM_PROTOCOL */
export const readRefuse = (body: Buffer): Refuse => {
  const { code, message, hint, generation } = readJson(body, 'refuse')
  if (typeof code !== 'string' || typeof message !== 'string') throw broken('refuse')
  return { code, message, ...(typeof hint === 'string' ? { hint } : {}), ...(isGeneration(generation) ? { generation } : {}) }
}

/** @throws CdpError STREAM_PROTOCOL */
export const readStateNews = (body: Buffer): StateNews => {
  const { validCheckpoint, syncWanted } = readJson(body, 'state')
  return { ...(validCheckpoint === undefined ? {} : { validCheckpoint: readPlace(validCheckpoint) }), ...(syncWanted === undefined ? {} : { syncWanted: readWanted(syncWanted) }) }
}

const readPlace = (value: unknown): { id: string; atUnixMs: number } => {
  const { id, atUnixMs } = isFields(value) ? value : {}
  if (typeof id !== 'string' || !isCount(atUnixMs)) throw broken('state')
  return { id, atUnixMs }
}

const readWanted = (value: unknown): { why: string } => {
  const { why } = isFields(value) ? value : {}
  if (typeof why !== 'string') throw broken('state')
  return { why: why.slice(0, 1000) }
}
