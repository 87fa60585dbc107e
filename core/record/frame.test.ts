import { describe, expect, test } from '@jest/globals'
import { crc32c } from '@node-rs/crc32'
import { errorCode } from '../errors/index.ts'
import {
  Compression, FLAG_DIRECT, FRAME_HEADER_BYTES, FrameBuilder, MAX_FRAME_PAYLOAD_BYTES, MAX_FRAME_RECORDS, NO_DISK, RECORD_ENTRY_BYTES, RecordKind, adaptiveZstd,
  decodeFramePayload, parseCheckpointMark, parseEpochMark, parseFrame, parseFrameHeader, readU64, recordJson, writeU64,
} from './index.ts'
import type { Compressor } from './index.ts'

const seal = { firstSeq: 7, epoch: 3, atUnixMs: 1_700_000_000_000, flags: 0 }

const frameOf = (build: (builder: FrameBuilder) => void, compress?: Compressor, slabBytes = 64 * 1024): Buffer => {
  const builder = new FrameBuilder(Buffer.alloc(slabBytes, 0xee), 16)
  build(builder)
  const { head, payload } = builder.seal(seal, compress)
  return Buffer.concat([head, payload])
}
const small = (): Buffer =>
  frameOf((builder) => {
    builder.payload.fill(0x5a, builder.reserveData(RecordKind.write, 0, 4096, 512), 512)
    builder.addRange(RecordKind.zero, 1, 0, 1024)
    builder.addJson(RecordKind.proof, 3, '{"ok":true}')
  })

/** The frame with some bytes changed and all checksums right again: what a broken peer, not a broken disk, would send. */
const forged = (change: (bytes: Buffer) => void): Buffer => {
  const bytes = small()
  change(bytes)
  bytes.writeUInt32LE(crc32c(bytes.subarray(FRAME_HEADER_BYTES)), 56)
  bytes.writeUInt32LE(crc32c(bytes.subarray(0, 60)), 60)
  return bytes
}
const outcomeOf = (bytes: Buffer): string | undefined => {
  try {
    parseFrame(bytes)
    return 'accepted'
  } catch (error) {
    return errorCode(error)
  }
}
const entry = FRAME_HEADER_BYTES
const sizes = (bytes: Buffer, payloadBytes: number): void => {
  bytes.writeUInt32LE(payloadBytes, 20)
  bytes.writeUInt32LE(payloadBytes, 24)
}

describe('a frame', () => {
  test('any single flipped bit is found', () => {
    const bytes = small()
    const outcomes = new Set<string | undefined>()
    for (let bit = 0; bit < bytes.length * 8; bit++) {
      bytes[bit >> 3] ^= 1 << (bit & 7)
      outcomes.add(outcomeOf(bytes))
      bytes[bit >> 3] ^= 1 << (bit & 7)
    }
    expect([...outcomes].sort()).toEqual(['CHECKSUM', 'FORMAT'])
    expect(parseFrame(bytes).header.lastSeq).toBe(9)
  })

  test('cut at any byte it is refused, never read beyond its end', () => {
    const bytes = small()
    for (let length = 0; length < bytes.length; length++) if (outcomeOf(bytes.subarray(0, length)) !== 'FORMAT') throw new Error(`cut at ${length}`)
    expect(outcomeOf(bytes)).toBe('accepted')
  })

  test.each<[string, (bytes: Buffer) => void]>([
    ['magic', (bytes) => bytes.writeUInt32LE(1, 0)],
    ['version 0', (bytes) => (bytes[4] = 0)],
    ['version 2', (bytes) => (bytes[4] = 2)],
    ['compression 2', (bytes) => (bytes[5] = 2)],
    ['required flag 2', (bytes) => (bytes[6] = 2)],
    ['required flags 0xff', (bytes) => (bytes[6] = 0xff)],
    ['no records', (bytes) => bytes.writeUInt32LE(0, 16)],
    ['too many records', (bytes) => bytes.writeUInt32LE(MAX_FRAME_RECORDS + 1, 16)],
    ['sequence 0', (bytes) => writeU64(bytes, 0, 8)],
    ['sequence of 2^53', (bytes) => bytes.writeBigUInt64LE(2n ** 53n, 8)],
    ['sequence that runs over 2^53', (bytes) => writeU64(bytes, Number.MAX_SAFE_INTEGER - 1, 8)],
    ['time of 2^53', (bytes) => bytes.writeBigUInt64LE(2n ** 53n, 32)],
    ['payload above 4 MiB', (bytes) => sizes(bytes, MAX_FRAME_PAYLOAD_BYTES + 512)],
    ['payload that is not made of sectors', (bytes) => sizes(bytes, 1025)],
    ['stored sizes that differ', (bytes) => bytes.writeUInt32LE(512, 24)],
    ['compressed but not smaller', (bytes) => (bytes[5] = Compression.zstd)],
    ['record kind 0', (bytes) => (bytes[entry] = 0)],
    ['record kind 14', (bytes) => (bytes[entry] = 14)],
    ['record kind 255', (bytes) => (bytes[entry] = 255)],
    ['record flags', (bytes) => (bytes[entry + 1] = 1)],
    ['range of no length', (bytes) => bytes.writeUInt32LE(0, entry + 4)],
    ['range that is not made of sectors', (bytes) => bytes.writeUInt32LE(511, entry + 4)],
    ['offset that is no sector', (bytes) => writeU64(bytes, 4097, entry + 8)],
    ['offset of 2^53', (bytes) => bytes.writeBigUInt64LE(2n ** 53n, entry + 8)],
    ['offset + length beyond 2^53', (bytes) => writeU64(bytes, Number.MAX_SAFE_INTEGER - 511, entry + 8)],
    ['data beyond the payload', (bytes) => bytes.writeUInt32LE(1024, entry + 16)],
    ['data not at a sector', (bytes) => bytes.writeUInt32LE(1, entry + 16)],
    ['JSON beyond the payload', (bytes) => bytes.writeUInt32LE(5000, entry + 2 * RECORD_ENTRY_BYTES + 4)],
  ])('with right checksums but %s is refused', (_what, change) => {
    expect(() => parseFrame(forged(change))).toThrow(expect.objectContaining({ code: 'FORMAT' }))
  })

  test('reserved bytes and optional flags are ignored', () => {
    const bytes = forged((frame) => {
      frame[7] = 0xff
      frame.fill(0xff, 40, 56)
      frame.fill(0xff, entry + 20, entry + 24)
    })
    expect(parseFrame(bytes).header).toMatchObject({ firstSeq: 7, lastSeq: 9, epoch: 3 })
  })

  test('a compressed payload that is no zstd, too long or too short for its header is refused before it is used', () => {
    const text = (builder: FrameBuilder): void => void builder.payload.fill(1, builder.reserveData(RecordKind.write, 0, 0, 8192), 8192)
    const zstd = frameOf(text, adaptiveZstd())
    const { header, stored } = parseFrame(zstd)
    expect(header.compression).toBe(Compression.zstd)
    expect(decodeFramePayload(header, stored).equals(Buffer.alloc(8192, 1))).toBe(true)
    expect(() => decodeFramePayload({ ...header, payloadRawBytes: 4096 }, stored)).toThrow(expect.objectContaining({ code: 'FORMAT' }))
    expect(() => decodeFramePayload({ ...header, payloadRawBytes: 16_384 }, stored)).toThrow(expect.objectContaining({ code: 'FORMAT' }))
    expect(() => decodeFramePayload(header, Buffer.alloc(stored.length, 7))).toThrow(expect.objectContaining({ code: 'FORMAT' }))
  })

  test('a payload that does not shrink is stored, and a nearly empty slab is not kept', () => {
    const builder = new FrameBuilder(Buffer.alloc(64 * 1024), 4)
    const fill = (lengthBytes: number): void => void builder.payload.fill(9, builder.reserveData(RecordKind.write, 0, 0, lengthBytes), lengthBytes)
    fill(4096)
    const notSmaller = builder.seal(seal, (raw) => Buffer.alloc(raw.length))
    expect(notSmaller).toMatchObject({ keepsSlab: false })
    expect(parseFrame(Buffer.concat([notSmaller.head, notSmaller.payload])).header).toMatchObject({ compression: Compression.stored, payloadStoredBytes: 4096 })
    expect(notSmaller.payload.buffer).not.toBe(builder.payload.buffer)
    builder.reset()
    fill(32 * 1024)
    const kept = builder.seal(seal)
    expect(kept.keepsSlab).toBe(true)
    expect(kept.payload.buffer).toBe(builder.payload.buffer)
  })

  test('bytes of an earlier frame never travel in the padding of JSON', () => {
    const { stored } = parseFrame(frameOf((builder) => builder.addJson(RecordKind.epoch, 0, '{}')))
    expect(stored.subarray(2).equals(Buffer.alloc(510))).toBe(true)
  })

  test('the direct flag and 64-bit values below 2^53 arrive as they were', () => {
    const builder = new FrameBuilder(Buffer.alloc(512), 1)
    builder.addRange(RecordKind.syncProgress, 5, Number.MAX_SAFE_INTEGER, 0)
    const { head } = builder.seal({ firstSeq: 2 ** 40 + 5, epoch: 0xffff_ffff, atUnixMs: Number.MAX_SAFE_INTEGER, flags: FLAG_DIRECT })
    const { header, table } = parseFrame(head)
    expect(header).toMatchObject({ firstSeq: 2 ** 40 + 5, epoch: 0xffff_ffff, atUnixMs: Number.MAX_SAFE_INTEGER, flags: FLAG_DIRECT })
    expect([table.kind(0), table.disk(0), table.offsetBytes(0)]).toEqual([RecordKind.syncProgress, 5, Number.MAX_SAFE_INTEGER])
    const bytes = Buffer.alloc(8, 0xff)
    expect(readU64(bytes, 0)).toBeGreaterThan(Number.MAX_SAFE_INTEGER)
  })

  test('header of 64 bytes only is judged without its body', () => {
    expect(parseFrameHeader(small().subarray(0, 64))).toMatchObject({ recordCount: 3, bodyBytes: 3 * 24 + 1024 })
  })

  test('a builder is full at its slab, at its table and at the caps of the format', () => {
    expect(() => new FrameBuilder(Buffer.alloc(MAX_FRAME_PAYLOAD_BYTES + 512))).toThrow(expect.objectContaining({ code: 'INTERNAL' }))
    expect(() => new FrameBuilder(Buffer.alloc(512), MAX_FRAME_RECORDS + 1)).toThrow(expect.objectContaining({ code: 'INTERNAL' }))
    const builder = new FrameBuilder(Buffer.alloc(1024), 3)
    expect([builder.fits(1024), builder.fits(1025)]).toEqual([true, false])
    builder.addJson(RecordKind.proof, 0, '{}')
    expect([builder.fits(512), builder.fits(513)]).toEqual([true, false])
    builder.addRange(RecordKind.zero, 0, 0, 512)
    builder.addRange(RecordKind.zero, 0, 0, 512)
    expect(builder.fits(0)).toBe(false)
  })
})

describe('marks', () => {
  const markOf = (text: string): unknown => {
    const { table, stored } = parseFrame(frameOf((builder) => builder.addJson(RecordKind.checkpoint, 5, text)))
    expect(table.disk(0)).toBe(NO_DISK)
    return recordJson(table, 0, stored)
  }
  const mark = { id: 'c1', vpg: 'shop', vms: ['101', '102'], atUnixMs: 5, kind: 'tagged', tag: 'before the update, äöü' }

  test('a checkpoint mark and an epoch mark arrive as they were', () => {
    expect(parseCheckpointMark(markOf(JSON.stringify(mark)))).toEqual(mark)
    const epoch = { reason: 'the VM runs', disks: [{ disk: 0, key: 'scsi0', sizeBytes: 512 }], config: 'name: a\n' }
    expect(parseEpochMark(markOf(JSON.stringify(epoch)))).toEqual(epoch)
  })

  test('broken JSON and unexpected fields are refused', () => {
    expect(() => markOf('{"id":')).toThrow(expect.objectContaining({ code: 'FORMAT' }))
    for (const broken of [undefined, null, [], 'x', { ...mark, id: 1 }, { ...mark, vms: 'all' }, { ...mark, vms: [1] }, { ...mark, kind: 'other' }, { ...mark, tag: 1 }, { ...mark, atUnixMs: '5' }]) {
      expect(() => parseCheckpointMark(broken)).toThrow(expect.objectContaining({ code: 'FORMAT' }))
    }
    for (const broken of [null, {}, { reason: 'x', disks: [{}] }, { reason: 1, disks: [] }]) expect(() => parseEpochMark(broken)).toThrow(expect.objectContaining({ code: 'FORMAT' }))
  })
})

describe('adaptive compression', () => {
  test('after data that do not compress at most 64 payloads are stored without a try, and none once it paid', () => {
    const compress = adaptiveZstd()
    const noise = Buffer.from(Array.from({ length: 4096 }, (_, at) => (Math.imul(at + 1, 0x9e37_79b1) >>> 13) & 255).map((byte, at) => byte ^ (Math.imul(at, 0x85eb_ca6b) >>> 24)))
    expect(compress(Buffer.alloc(2047))).toBeUndefined()
    expect(compress(Buffer.alloc(4096))?.length).toBeLessThan(100)
    let refusals = 0
    for (let at = 0; at < 300; at++) if (compress(noise) === undefined) refusals++
    expect(refusals).toBe(300)
    let skipped = 0
    while (compress(Buffer.alloc(4096)) === undefined) skipped++
    expect(skipped).toBeLessThanOrEqual(64)
    expect(compress(Buffer.alloc(4096))).toBeDefined()
  })
})
