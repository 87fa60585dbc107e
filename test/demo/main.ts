// The demo behind scripts/demo: two sites on one machine, two guests protected, a ransomware attack, recovery to the last checkpoint before it.
// Every statement it prints was checked; the last line is one JSON object, the exit code 0 only if every check held.
import { mkdirSync } from 'node:fs'
import { performance } from 'node:perf_hooks'
import { setTimeout as delay } from 'node:timers/promises'
import { pluginApi } from '../../core/api/index.ts'
import { CdpError, errorMessage } from '../../core/errors/index.ts'
import {
  bootGuest, checkExt4, checkPrefix, createOverlay, durableRecord, lastingLeaksOf, makeExt4Image, makeTempDir, manifestDifferences, manifestOf, readJournal, runRansomware,
  startJournalWriter, untilRecord, writeDocuments,
} from '../lab/index.ts'
import type { Guest, Manifest, VmShape } from '../lab/index.ts'
import { Sites, until } from '../lab/sites.ts'

const VPG = 'demo'
const DISK_BYTES = 256 * 1024 * 1024
const DOCUMENTS = 200
const GUESTS: { vmId: number; shape: VmShape }[] = [{ vmId: 101, shape: '9.x' }, { vmId: 102, shape: '8.4' }]
const KEYS = ['scsi0', 'scsi1']

const beganMs = performance.now()
const say = (line: string): void => console.log(`[${((performance.now() - beganMs) / 1000).toFixed(1).padStart(6)} s] ${line}`)
const seconds = (ms: number): string => `${(ms / 1000).toFixed(1)} s`

const must = (holds: boolean, what: string): void => {
  if (!holds) throw new CdpError('INTERNAL', `this does not hold: ${what}`)
  say(`  ok: ${what}`)
}

const bootProtected = async (rootDir: string): Promise<Guest[]> =>
  Promise.all(GUESTS.map(async ({ vmId, shape }) => {
    const disks = []
    for (const [index, key] of KEYS.entries()) {
      const path = `${rootDir}/vm-${vmId}-disk-${index}.raw`
      await makeExt4Image(path, DISK_BYTES)
      disks.push({ key, path, format: 'raw' as const })
    }
    return bootGuest({ rootDir, vmId, shape, disks, mount: KEYS })
  }))

const showLive = async (sites: Sites, forSeconds: number): Promise<number> => {
  let worstRpoMs = 0
  for (let second = 0; second < forSeconds; second++) {
    await delay(1000)
    const vpg = (await sites.pluginStatus()).vpgs[0]
    const onAgent = (await sites.agentStatus()).vpgs[0]
    if (vpg.rpoMs === null) throw new CdpError('INTERNAL', 'the RPO is unknown while the group is protected')
    worstRpoMs = Math.max(worstRpoMs, vpg.rpoMs)
    const vms = vpg.vms.map((vm) => `VM ${vm.vmId} ${vm.state}, record ${vm.durableSeq}, ack p99 ${(vm.ackLatencyUs.p99 / 1000).toFixed(1)} ms`)
    say(`  RPO ${vpg.rpoMs} ms, ${onAgent.checkpoints} checkpoints; ${vms.join('; ')}`)
  }
  return worstRpoMs
}

const recover = async (sites: Sites, rootDir: string, checkpointId: string): Promise<{ guests: Guest[]; timeToBootMs: number }> => {
  const askedMs = performance.now()
  const point = await sites.openPoint(VPG, checkpointId)
  const recoveryDir = `${rootDir}/r`
  mkdirSync(recoveryDir)
  const guests = await Promise.all(GUESTS.map(async ({ vmId, shape }) => {
    const disks = []
    for (const { key, uri, sizeBytes } of point.disks.filter((disk) => disk.vmId === vmId)) {
      const path = `${recoveryDir}/vm-${vmId + 800}-${key}.qcow2`
      await createOverlay(path, uri, sizeBytes)
      disks.push({ key, path, format: 'qcow2' as const })
    }
    return bootGuest({ rootDir: recoveryDir, vmId: vmId + 800, shape, disks, mount: KEYS })
  }))
  return { guests, timeToBootMs: performance.now() - askedMs }
}

const run = async (stack: AsyncDisposableStack): Promise<Record<string, unknown>> => {
  const directory = stack.use(makeTempDir())
  const rootDir = directory.path
  stack.defer(async () => {
    const leaks = await lastingLeaksOf(rootDir)
    if (leaks.length > 0) throw new CdpError('INTERNAL', `left behind: ${leaks.join(', ')}`)
  })
  say('booting two guests with two ext4 disks each (QEMU without KVM: slow, but real)')
  const guests = await bootProtected(rootDir)
  for (const guest of guests) stack.use(guest.vm)
  say(`guests answer; VM 101 runs as on Proxmox VE 9.x, VM 102 as on 8.4`)

  const sites = stack.use(await Sites.start({ rootDir }))
  await sites.pair()
  say('both sites are up and paired by a one-time token')
  const documents: Manifest[] = await Promise.all(guests.map((guest) => writeDocuments(guest, '/mnt/scsi0/documents', DOCUMENTS, guest.vm.vmId)))
  say(`${DOCUMENTS} documents are in each guest; protecting both as one group, a checkpoint each second`)
  await sites.createVpg(VPG, GUESTS.map(({ vmId }) => vmId), 1000)
  await sites.untilProtected(VPG)
  say('the first copy is complete; every write is captured from here on')

  for (const guest of guests) startJournalWriter(guest, ['/mnt/scsi0', '/mnt/scsi1'])
  await Promise.all(guests.map((guest) => untilRecord(guest, 20)))
  const worstRpoMs = await showLive(sites, 6)
  must(worstRpoMs < 5000, `the RPO stayed below 5 s under load (worst ${worstRpoMs} ms)`)

  await sites.untilProtected(VPG)
  const written = await Promise.all(guests.map((guest) => durableRecord(guest)))
  await sites.plugin.api.call(pluginApi.tagCheckpoint, { params: { name: VPG }, body: { tag: 'before month-end' } })
  const attackAtUnixMs = Date.now()
  const lost = await runRansomware(guests[0], '/mnt/scsi0/documents')
  await guests[0].check('sync')
  say(`ransomware has overwritten ${lost} documents in VM 101`)
  must(manifestDifferences(documents[0], await manifestOf(guests[0], '/mnt/scsi0/documents')).length >= DOCUMENTS, 'no document of VM 101 is readable any more')
  await until('a checkpoint after the attack', 15_000, async () => (await sites.checkpoints(VPG, 1))[0]?.atUnixMs > attackAtUnixMs || undefined)
  await showLive(sites, 1)

  const checkpoints = await sites.checkpoints(VPG)
  const chosen = checkpoints.find(({ atUnixMs, state }) => atUnixMs <= attackAtUnixMs && (state === 'valid' || state === 'proved'))
  if (chosen === undefined) throw new CdpError('INTERNAL', 'no checkpoint before the attack')
  say(`the last checkpoint before it: ${new Date(chosen.atUnixMs).toISOString()} (${chosen.state}${chosen.tag === undefined ? '' : `, "${chosen.tag}"`}), ${seconds(attackAtUnixMs - chosen.atUnixMs)} before the attack; booting both guests from it`)
  const recovered = await recover(sites, rootDir, chosen.id)
  for (const guest of recovered.guests) stack.use(guest.vm)
  say(`both recovered guests answer after ${seconds(recovered.timeToBootMs)}, while the attacked ones still run`)
  for (const [index, guest] of recovered.guests.entries()) {
    const differences = manifestDifferences(documents[index], await manifestOf(guest, '/mnt/scsi0/documents'))
    must(differences.length === 0, `all ${DOCUMENTS} documents of VM ${GUESTS[index].vmId} are back`)
    const prefix = checkPrefix(await Promise.all(KEYS.map((key) => readJournal(guest, `/mnt/${key}`))))
    must(prefix.ok && prefix.last > 0, `the workload's records 1 to ${prefix.last} are whole and in order over both disks${prefix.problem === undefined ? '' : ` (${prefix.problem})`}`)
    must(prefix.last >= written[index] || chosen.tag === undefined, `everything that was durable at the tag is there (${written[index]} records)`)
  }
  const point = await sites.openPoint(VPG, chosen.id)
  for (const { vmId, key, uri } of point.disks) {
    const { clean, report } = await checkExt4(uri, rootDir)
    must(clean, `ext4 on ${key} of VM ${vmId} is clean${clean ? '' : `: ${report}`}`)
  }
  await sites.closePoint(point.pointId)
  const vpg = (await sites.pluginStatus()).vpgs[0]
  must(vpg.state === 'protected', 'protection went on all the while')
  return { ok: true, rpoMs: worstRpoMs, timeToBootMs: Math.round(recovered.timeToBootMs), checkpoints: checkpoints.length, abandonedCuts: vpg.abandonedCuts, totalMs: Math.round(performance.now() - beganMs) }
}

let result: Record<string, unknown>
try {
  await using stack = new AsyncDisposableStack()
  result = await run(stack)
  say('tearing down')
} catch (error) {
  result = { ok: false, error: errorMessage(error) }
  process.exitCode = 1
}
console.log(JSON.stringify(result))
process.exit()
