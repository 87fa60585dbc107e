import { describe, expect, test } from '@jest/globals'
import { STAMP_BYTES, WriteHistory, checkCut, describeViolation, knows, readStamp, stampWrite } from './index.ts'
import type { CutBracket, CutReport, HistoryWrite } from './index.ts'
import { isBlankSector, stampProblem } from './stamp.ts'

const RUN = 4711
const ROUNDS = process.env.CDP_ALL === undefined ? 25 : 500
const SECTORS = [40, 24, 32]

/** xorshift32, so that a seed tells the whole history. */
const seeded = (seed: number) => {
  let state = (Math.imul(seed, 0x9e37_79b1) ^ 0x5bd1_e995) | 1
  return (below: number): number => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
}

/** What disks show after some of the writes, in any order of their choice. */
const imagesOf = (writes: Iterable<{ write: HistoryWrite; data: Buffer }>): Buffer[] => {
  const images = SECTORS.map((sectors) => Buffer.alloc(sectors * STAMP_BYTES))
  for (const { write, data } of writes) data.copy(images[write.disk], write.firstSector * STAMP_BYTES)
  return images
}

type Made = { write: HistoryWrite; data: Buffer; knew: Set<number> }
/** `submitted`: by ordinal - 1. `log`: order in which a journal could hold them: each somewhere between submission and acknowledgement. */
type Simulated = { history: WriteHistory; submitted: Made[]; log: { made: Made; ackedBefore: Uint32Array; submittedBefore: Uint32Array }[] }

/** Writers over three disks with several writes under way, as they would run against real disks. */
const simulate = (seed: number, steps: number): Simulated => {
  const random = seeded(seed)
  const writerCount = 1 + random(5)
  const history = new WriteHistory({ runId: RUN, writerCount, sectorsOfDisks: SECTORS })
  const submitted: Made[] = []
  const log: Simulated['log'] = []
  const acked = new Set<number>()
  let underWay: { made: Made; landed: boolean }[] = []
  for (let step = 0; step < steps; step++) {
    const act = random(3)
    if (act === 0) {
      const disk = random(SECTORS.length)
      const sectors = 1 + random(6)
      const firstSector = random(SECTORS[disk] - sectors)
      const writer = random(writerCount)
      if (!history.isFree(disk, firstSector, sectors) || !history.hasRoom(writer)) continue
      const write = history.submit(writer, disk, firstSector, sectors)
      const data = Buffer.alloc(sectors * STAMP_BYTES, random(256))
      stampWrite(data, write, history.knowledge)
      const made = { write, data, knew: new Set(acked) }
      submitted.push(made)
      underWay.push({ made, landed: false })
    } else if (underWay.length > 0) {
      const one = underWay[random(underWay.length)]
      if (!one.landed) {
        one.landed = true
        log.push({ made: one.made, ackedBefore: history.knowledge.slice(), submittedBefore: history.submitted.slice() })
      } else {
        underWay = underWay.filter((other) => other !== one)
        history.acknowledge(one.made.write)
        acked.add(one.made.write.ordinal)
      }
    }
  }
  return { history, submitted, log }
}

/** The same question, asked the slow and obvious way: which needed writes are hidden in an image made of these writes in this order? */
const missingByHand = ({ submitted }: Simulated, applied: readonly Made[]): Set<number> => {
  const shown = SECTORS.map((sectors) => new Array<number>(sectors).fill(0))
  for (const { write } of applied) for (let sector = 0; sector < write.sectors; sector++) shown[write.disk][write.firstSector + sector] = write.ordinal
  const needed = new Set<number>()
  for (const ordinal of new Set(shown.flat())) if (ordinal !== 0) for (const other of submitted[ordinal - 1].knew) needed.add(other)
  const missing = new Set<number>()
  for (const ordinal of needed) {
    const { write } = submitted[ordinal - 1]
    if (shown[write.disk].slice(write.firstSector, write.firstSector + write.sectors).some((other) => other < ordinal)) missing.add(ordinal)
  }
  return missing
}

const missingOf = (report: CutReport): Set<number> => new Set(report.violations.flatMap((one) => (one.is === 'missing' ? [one.missing.ordinal] : [])))

const forSeeds = (what: (simulated: Simulated, random: (below: number) => number, seed: number) => void): void => {
  const first = Number(process.env.CDP_SEED ?? 1 + Math.floor(Math.random() * 1e9))
  for (let round = 0; round < ROUNDS; round++) {
    const seed = first + round
    try {
      what(simulate(seed, 300), seeded(seed + 1), seed)
    } catch (cause) {
      throw new Error(`seed ${seed}`, { cause })
    }
  }
}

describe('a stamp', () => {
  const knowledge = Uint32Array.from([7, 0b101, 0, 0])
  const write = { runId: RUN, writer: 1, sequence: 3, disk: 2, firstSector: 5, sectors: 2 }

  test('says in every sector who wrote it where and what was known', () => {
    const data = Buffer.alloc(2 * STAMP_BYTES, 0xaa)
    stampWrite(data, write, knowledge)
    expect(readStamp(data.subarray(STAMP_BYTES), RUN)).toEqual({ writer: 1, sequence: 3, disk: 2, sector: 6, knowledge })
    expect(data[STAMP_BYTES - 5]).toBe(0xaa)
    expect(readStamp(data, RUN + 1)).toBeUndefined()
  })

  test('one flipped bit anywhere is found', () => {
    const data = Buffer.alloc(2 * STAMP_BYTES, 0xaa)
    stampWrite(data, write, knowledge)
    const place = { runId: RUN, disk: 2, sector: 5, writerCount: 2 }
    expect(stampProblem(data, 0, place)).toBeUndefined()
    for (let bit = 0; bit < STAMP_BYTES * 8; bit++) {
      data[bit >> 3] ^= 1 << (bit & 7)
      expect(stampProblem(data, 0, place)).toBeDefined()
      data[bit >> 3] ^= 1 << (bit & 7)
    }
  })

  test('is not taken at another place, and blank means all of the sector', () => {
    const data = Buffer.alloc(2 * STAMP_BYTES)
    expect(isBlankSector(data, STAMP_BYTES)).toBe(true)
    data[2 * STAMP_BYTES - 1] = 1
    expect(isBlankSector(data, STAMP_BYTES)).toBe(false)
    stampWrite(data, write, knowledge)
    expect(stampProblem(data, 0, { runId: RUN, disk: 1, sector: 5, writerCount: 2 })).toContain('disk 2 sector 5')
    expect(stampProblem(data, STAMP_BYTES, { runId: RUN, disk: 2, sector: 5, writerCount: 2 })).toContain('sector 6')
  })

  test('knowledge is exact for acknowledgements out of order', () => {
    expect([7, 8, 9, 10, 11, 40].map((sequence) => knows(knowledge, 0, sequence))).toEqual([true, true, false, true, false, false])
    const history = new WriteHistory({ runId: RUN, writerCount: 2, sectorsOfDisks: [64] })
    const writes = Array.from({ length: 32 }, (_, sector) => history.submit(1, 0, sector, 1))
    expect(history.hasRoom(1)).toBe(false)
    expect(() => history.submit(1, 0, 40, 1)).toThrow('order')
    expect(() => history.submit(0, 0, 31, 2)).toThrow('order')
    for (const one of writes.toReversed()) {
      history.acknowledge(one)
      for (const other of writes) expect(history.isAcknowledged(1, other.sequence)).toBe(other.sequence >= one.sequence)
    }
    expect([...history.knowledge]).toEqual([0, 0, 32, 0])
  })
})

describe('checkCut', () => {
  test('every prefix of a journal is closed, and lies within what was known around it', () => {
    forSeeds(({ history, log }) => {
      for (let cut = 0; cut < log.length; cut++) {
        const bracket: CutBracket = { ackedBefore: log[cut].ackedBefore, submittedAfter: log[cut].submittedBefore }
        // The record at the cut had been submitted already, and everything acknowledged by then lies before it.
        const report = checkCut(history, imagesOf(log.slice(0, cut + 1).map(({ made }) => made)), bracket)
        expect(report.violations.map(describeViolation)).toEqual([])
        expect(report.tornUnderWay).toBe(0)
      }
    })
  })

  test('the loss of any single write that anything shown depends on is found, and no other', () => {
    let found = 0
    forSeeds((simulated, random) => {
      const cut = 1 + random(simulated.log.length)
      const whole = simulated.log.slice(0, cut).map(({ made }) => made)
      for (let lost = 0; lost < cut; lost++) {
        const applied = whole.toSpliced(lost, 1)
        const report = checkCut(simulated.history, imagesOf(applied))
        expect(missingOf(report)).toEqual(missingByHand(simulated, applied))
        found += report.violationCount
      }
    })
    expect(found).toBeGreaterThan(ROUNDS)
  })

  test('any set of writes in any order gets the verdict that the definition gives', () => {
    forSeeds((simulated, random) => {
      const applied = simulated.log.map(({ made }) => made).filter(() => random(5) > 0)
      for (let swaps = random(6); swaps > 0; swaps--) {
        const [one, other] = [random(applied.length), random(applied.length)]
        ;[applied[one], applied[other]] = [applied[other], applied[one]]
      }
      const report = checkCut(simulated.history, imagesOf(applied))
      const byHand = missingByHand(simulated, applied)
      expect(report.violationCount).toBe(byHand.size)
      if (byHand.size <= 100) expect(missingOf(report)).toEqual(byHand)
    })
  })

  test('a disk that lags behind the others is found as soon as it hides a needed write', () => {
    forSeeds((simulated, random) => {
      const { log, history } = simulated
      const cut = random(log.length)
      const late = Math.min(log.length, cut + 1 + random(20))
      const disk = random(SECTORS.length)
      const applied = log.filter((_, at) => at < cut).concat(log.slice(cut, late).filter(({ made }) => made.write.disk !== disk)).map(({ made }) => made)
      expect(missingOf(checkCut(history, imagesOf(applied)))).toEqual(missingByHand(simulated, applied))
    })
  })

  test('a stale cut is closed, but not what was asked for; a late one shows what came after', () => {
    const history = new WriteHistory({ runId: RUN, writerCount: 2, sectorsOfDisks: SECTORS })
    const put = (writer: number, disk: number, sector: number): Made => {
      const write = history.submit(writer, disk, sector, 1)
      const data = Buffer.alloc(STAMP_BYTES)
      stampWrite(data, write, history.knowledge)
      return { write, data, knew: new Set() }
    }
    const first = put(0, 0, 1)
    history.acknowledge(first.write)
    const ackedBefore = history.knowledge.slice()
    const submittedAfter = history.submitted.slice()
    const second = put(1, 1, 1)
    history.acknowledge(second.write)
    expect(checkCut(history, imagesOf([])).violationCount).toBe(0)
    expect(checkCut(history, imagesOf([]), { ackedBefore, submittedAfter }).violations).toMatchObject([{ is: 'missing', missing: { ordinal: 1 }, because: undefined, shown: undefined }])
    expect(checkCut(history, imagesOf([first]), { ackedBefore, submittedAfter }).violationCount).toBe(0)
    expect(checkCut(history, imagesOf([first, second]), { ackedBefore, submittedAfter }).violations).toMatchObject([{ is: 'late', write: { ordinal: 2 } }])
  })

  test('a torn write is a violation once anything knew of it, and is tolerated and counted before', () => {
    const history = new WriteHistory({ runId: RUN, writerCount: 1, sectorsOfDisks: SECTORS })
    const write = history.submit(0, 0, 4, 4)
    const data = Buffer.alloc(4 * STAMP_BYTES)
    stampWrite(data, write, history.knowledge)
    const half = { write, data: data.subarray(0, 2 * STAMP_BYTES) }
    expect(checkCut(history, imagesOf([half]))).toMatchObject({ violationCount: 0, tornUnderWay: 1, visibleWrites: 1 })
    history.acknowledge(write)
    const next = history.submit(0, 2, 0, 1)
    const nextData = Buffer.alloc(STAMP_BYTES)
    stampWrite(nextData, next, history.knowledge)
    const report = checkCut(history, imagesOf([half, { write: next, data: nextData }]))
    expect(report.violations.map(describeViolation)).toEqual(['write 0/1 (disk 0, sector 4+4) was acknowledged before write 0/2 (disk 2, sector 0+1) was submitted, which is there; sector 6 shows nothing'])
  })

  test('garbage, sectors of another run, moved sectors and writes that nobody made are violations', () => {
    const history = new WriteHistory({ runId: RUN, writerCount: 1, sectorsOfDisks: SECTORS })
    const write = history.submit(0, 0, 0, 2)
    const data = Buffer.alloc(2 * STAMP_BYTES)
    const image = (change: (images: Buffer[]) => void): string[] => {
      stampWrite(data, write, history.knowledge)
      const images = imagesOf([{ write, data }])
      change(images)
      return checkCut(history, images).violations.map(describeViolation)
    }
    expect(image(() => undefined)).toEqual([])
    expect(image(([disk]) => (disk[700] ^= 1))).toEqual(['disk 0 sector 1: the checksum is wrong'])
    expect(image(([, disk]) => disk.write('junk', 512))).toEqual(['disk 1 sector 1: neither blank nor stamped'])
    expect(image(([disk, other]) => disk.copy(other, 0, 0, 512))).toEqual(['disk 1 sector 0: written for disk 0 sector 0'])
    expect(image(([disk]) => stampWrite(disk.subarray(0, 512), { ...write, runId: 1, sectors: 1 }, history.knowledge))).toEqual(['disk 0 sector 0: stamped by another run'])
    expect(image(([disk]) => stampWrite(disk.subarray(0, 512), { ...write, sequence: 2, sectors: 1 }, history.knowledge))).toEqual(['disk 0 sector 0: shows write 2 of writer 0, which was never made there'])
    expect(image(([disk]) => stampWrite(disk.subarray(1024, 1536), { ...write, firstSector: 2, sectors: 1 }, history.knowledge))).toEqual(['disk 0 sector 2: shows write 1 of writer 0, which was never made there'])
  })
})
