/** Everything we make in a QEMU begins with this; nothing else may be touched. */
export const ourPrefix = 'cdp-'

export const isOurs = (name: string): boolean => name.startsWith(ourPrefix)

/** Names of what is made for the disk `key` ('scsi0'). Deterministic, so that a half state can be read from QEMU alone. */
export type DiskNames = {
  job: string
  /** NBD client node: where the mirror job writes to. */
  target: string
  /** The mirror job's filter: made and removed by the job. */
  filter: string
  /** Raw node above the filter (8.4). */
  shield: string
  /** Block export id and NBD export name of the read-only export. */
  readExport: string
}

export const namesOf = (key: string): DiskNames => ({
  job: `cdp-job-${key}`,
  target: `cdp-target-${key}`,
  filter: `cdp-filter-${key}`,
  shield: `cdp-shield-${key}`,
  readExport: `cdp-read-${key}`,
})

/** The disk that a job, node or export of ours belongs to: 'cdp-target-scsi0' -> 'scsi0'. Undefined if the name is not ours. */
export const keyOfName = (name: string): string | undefined => /^cdp-(?:job|target|filter|shield|read)-(.+)$/.exec(name)?.[1]

/** Names of what an incremental round makes for a disk. */
export type RoundNames = {
  job: string
  filter: string
  /** What the job writes to: `target` and `sink`, of which one is enough. */
  either: string
  /** NBD client node. */
  target: string
  /** Takes everything and keeps nothing. */
  sink: string
}

export const roundNamesOf = (key: string): RoundNames => ({
  job: `cdp-round-job-${key}`, filter: `cdp-round-filter-${key}`, either: `cdp-round-either-${key}`, target: `cdp-round-target-${key}`, sink: `cdp-round-sink-${key}`,
})

/** The disk that a part of a round belongs to; undefined if it is none. */
export const keyOfRoundName = (name: string): string | undefined => /^cdp-round-(?:job|filter|either|target|sink)-(.+)$/.exec(name)?.[1]

const bitmapPrefix = 'cdp-bitmap-'

export const bitmapName = (number: number): string => `${bitmapPrefix}${number}`

const carriedPrefix = 'cdp-carried-'

/** What goes with a bitmap to another node: all that it lacks, of the disk's first so many bytes, is durable at that recovery site, which holds everything up to `durableSeq`. */
export type CarriedClaim = { coveredBytes: number; agentId: string; durableSeq: number }

export const carriedName = ({ coveredBytes, agentId, durableSeq }: CarriedClaim): string => `${carriedPrefix}${coveredBytes}-${agentId}-${durableSeq}`

/** Undefined if it is none. */
export const carriedClaim = (name: string): CarriedClaim | undefined => {
  const [, coveredBytes, agentId, durableSeq] = (name.startsWith(carriedPrefix) ? /^([0-9]{1,15})-([0-9a-f]{16})-([0-9]{1,15})$/.exec(name.slice(carriedPrefix.length)) : null) ?? []
  return agentId === undefined ? undefined : { coveredBytes: Number(coveredBytes), agentId, durableSeq: Number(durableSeq) }
}

/** The number in a bitmap's name: higher is younger. Undefined if it is not ours. */
export const bitmapNumber = (name: string): number | undefined => {
  const digits = name.startsWith(bitmapPrefix) ? name.slice(bitmapPrefix.length) : ''
  return /^[0-9]{1,9}$/.test(digits) ? Number(digits) : undefined
}
