import { STAMP_BYTES, isBlankSector, stampAckedAhead, stampAckedUpTo, stampProblem, stampSequence, stampWriter } from './stamp.ts'
import type { Knowledge } from './stamp.ts'
import type { HistoryWrite, WriteHistory } from './write-history.ts'

/** What is known about when the cut was made, if the same process asked for it. */
export type CutBracket = {
  /** The history's `knowledge` just before the cut was requested: these writes must be in it. */
  ackedBefore: Knowledge
  /** The history's `submitted` just after the request was answered: nothing later can be in it. */
  submittedAfter: Uint32Array
}

export type Violation =
  /** `missing` was acknowledged before `because` was submitted (undefined: before the cut was requested); the disks show `because` and not `missing`. */
  | { is: 'missing'; missing: HistoryWrite; firstSector: number; shown: HistoryWrite | undefined; because: HistoryWrite | undefined }
  /** A sector that no write of this proof left like that. */
  | { is: 'damaged'; disk: number; sector: number; why: string }
  /** A write that was submitted after the cut had been made. */
  | { is: 'late'; write: HistoryWrite }

export type CutReport = {
  /** All violations; the first 100 are described in `violations`. */
  violationCount: number
  violations: Violation[]
  /** Writes of which at least one sector is shown. */
  visibleWrites: number
  /** Writes that had to be there. */
  requiredWrites: number
  stampedSectors: number
  /** Writes shown in part, the other part being older. Allowed only while nothing required them, see checkCut. */
  tornUnderWay: number
}

const DESCRIBED = 100

/**
 * The write-order proof (semantics.md, Proof): are the disks of one recovery point closed under *precedes*?
 *
 * A precedes B when A was acknowledged before B was submitted. A sector shows a write if its stamp is that write's. The invariant, over all
 * disks of all VMs together: **if any sector shows B, then for every A that precedes B each sector of A shows A, or a write to that sector
 * which came after A.** What B knew is in B's own stamp; since one process sees all acknowledgements, it holds all that precedes B, so one step is
 * the transitive closure too. "Came after" is the order of submission: overlapping writes are never under way at once.
 *
 * With `bracket` two more: every write acknowledged before the cut was requested is required like any A (else a cut that shows nothing,
 * or a stale one, would be closed), and no write submitted after the answer may be shown.
 *
 * A wrong checksum, a foreign stamp, a stamp at a wrong place, a blank sector where something is required: always violations. The atom is the
 * sector, as on a disk. A write shown in part is a violation if anything required it: it was acknowledged, and acknowledged means whole. If nothing
 * did, it was still under way at the cut; any disk may show that after a power failure. It is tolerated and counted in `tornUnderWay`; what its
 * shown sectors knew is required all the same.
 *
 * What this cannot see: writes that are overwritten before the cut (nobody can read them any more); dependencies that writers had outside
 * the process; zeroes and discards, which carry no stamp; bytes outside the stamped regions; order inside the cut, which no reader of the
 * point can see either; and whether the source disks hold what was acknowledged (online verify compares those).
 *
 * @param images content of each disk's stamped region at the recovery point, in the history's order
 */
export const checkCut = (history: WriteHistory, images: readonly Buffer[], bracket?: CutBracket): CutReport => {
  const { writerCount, runId, sectorsOfDisks } = history
  const violations: Violation[] = []
  let violationCount = 0
  const report = (violation: () => Violation): void => {
    if (violationCount++ < DESCRIBED) violations.push(violation())
  }

  // What each sector shows, and what the shown writes required.
  const shown = sectorsOfDisks.map((sectors) => new Uint32Array(sectors))
  const seen = new Uint8Array(history.count + 1)
  const requiredUpTo = new Uint32Array(writerCount)
  const upToBecause = new Uint32Array(writerCount)
  const aheadBecause = new Map<number, number>()
  const require = (writer: number, upTo: number, ahead: number, because: number): void => {
    if (upTo > requiredUpTo[writer]) {
      requiredUpTo[writer] = upTo
      upToBecause[writer] = because
    }
    for (let bits = ahead, sequence = upTo + 1; bits !== 0; bits >>>= 1, sequence++) {
      if ((bits & 1) === 0) continue
      const ordinal = history.ordinalOf(writer, sequence)
      if (!aheadBecause.has(ordinal)) aheadBecause.set(ordinal, because)
    }
  }
  let visibleWrites = 0
  let stampedSectors = 0
  const shownSectors = new Map<number, number>()
  for (const [disk, image] of images.entries()) {
    const sectors = sectorsOfDisks[disk]
    for (let sector = 0; sector < sectors; sector++) {
      const offset = sector * STAMP_BYTES
      if (isBlankSector(image, offset)) continue
      const problem = stampProblem(image, offset, { runId, disk, sector, writerCount })
      if (problem !== undefined) {
        report(() => ({ is: 'damaged', disk, sector, why: problem }))
        continue
      }
      const writer = stampWriter(image, offset)
      const sequence = stampSequence(image, offset)
      const ordinal = history.ordinalOf(writer, sequence)
      if (ordinal === 0 || history.diskOf(ordinal) !== disk || sector < history.firstSectorOf(ordinal) || sector >= history.firstSectorOf(ordinal) + history.sectorsOf(ordinal)) {
        report(() => ({ is: 'damaged', disk, sector, why: `shows write ${sequence} of writer ${writer}, which was never made there` }))
        continue
      }
      stampedSectors++
      shown[disk][sector] = ordinal
      shownSectors.set(ordinal, (shownSectors.get(ordinal) ?? 0) + 1)
      if (seen[ordinal] !== 0) continue
      seen[ordinal] = 1
      visibleWrites++
      for (let other = 0; other < writerCount; other++) require(other, stampAckedUpTo(image, offset, other), stampAckedAhead(image, offset, other), ordinal)
      if (bracket !== undefined && sequence > bracket.submittedAfter[writer]) report(() => ({ is: 'late', write: history.write(ordinal) }))
    }
  }
  if (bracket !== undefined) {
    for (let writer = 0; writer < writerCount; writer++) require(writer, bracket.ackedBefore[writer * 2], bracket.ackedBefore[writer * 2 + 1], 0)
  }

  // Is all that is required there?
  let requiredWrites = 0
  const mustBeThere = (ordinal: number, because: number): void => {
    requiredWrites++
    const on = shown[history.diskOf(ordinal)]
    const first = history.firstSectorOf(ordinal)
    const end = first + history.sectorsOf(ordinal)
    for (let sector = first; sector < end; sector++) {
      if (on[sector] >= ordinal) continue
      const instead = on[sector]
      report(() => ({
        is: 'missing', missing: history.write(ordinal), firstSector: sector,
        shown: instead === 0 ? undefined : history.write(instead), because: because === 0 ? undefined : history.write(because),
      }))
      return
    }
  }
  for (let writer = 0; writer < writerCount; writer++) {
    for (let sequence = 1; sequence <= requiredUpTo[writer]; sequence++) mustBeThere(history.ordinalOf(writer, sequence), upToBecause[writer])
  }
  for (const [ordinal, because] of aheadBecause) {
    const { writer, sequence } = history.write(ordinal)
    if (sequence > requiredUpTo[writer]) mustBeThere(ordinal, because)
  }

  return { violationCount, violations, visibleWrites, requiredWrites, stampedSectors, tornUnderWay: countTorn(history, shown, shownSectors) }
}

/** Writes that are shown in some sectors while others show something older. */
const countTorn = (history: WriteHistory, shown: readonly Uint32Array[], shownSectors: ReadonlyMap<number, number>): number => {
  let torn = 0
  for (const [ordinal, sectors] of shownSectors) {
    if (sectors === history.sectorsOf(ordinal)) continue
    const first = history.firstSectorOf(ordinal)
    if (shown[history.diskOf(ordinal)].subarray(first, first + history.sectorsOf(ordinal)).some((other) => other < ordinal)) torn++
  }
  return torn
}

const nameOf = ({ writer, sequence, disk, firstSector, sectors }: HistoryWrite): string => `write ${writer}/${sequence} (disk ${disk}, sector ${firstSector}+${sectors})`

/** One line for a person. */
export const describeViolation = (violation: Violation): string => {
  switch (violation.is) {
    case 'missing': {
      const { missing, firstSector, shown, because } = violation
      const why = because === undefined ? 'was acknowledged before the cut was requested' : `was acknowledged before ${nameOf(because)} was submitted, which is there`
      return `${nameOf(missing)} ${why}; sector ${firstSector} shows ${shown === undefined ? 'nothing' : nameOf(shown)}`
    }
    case 'damaged':
      return `disk ${violation.disk} sector ${violation.sector}: ${violation.why}`
    case 'late':
      return `${nameOf(violation.write)} was submitted after the cut and is there`
  }
}
