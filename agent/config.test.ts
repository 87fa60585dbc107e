import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from '@jest/globals'
import { loadConfig } from '../core/config/index.ts'
import { AgentConfig } from './config.ts'
import { chooseMirror } from './mirror/index.ts'
import { policyFrom } from './retention/index.ts'

test('retention: a day and thinning by default, limits follow from one another, single VPGs differ, nonsense is refused', async () => {
  const directory = await mkdtemp('/tmp/cdp-config-')
  try {
    const load = async (retention: object) => {
      await writeFile(join(directory, 'agent.json'), JSON.stringify({ retention }))
      return (await loadConfig(join(directory, 'agent.json'), AgentConfig)).retention
    }
    expect(policyFrom(await load({}))).toEqual({
      historyMs: 86_400_000, thinning: [{ afterMs: 86_400_000, everyMs: 60_000 }, { afterMs: 604_800_000, everyMs: 3_600_000 }],
      journalLimitBytes: undefined, warnBytes: undefined, hardStopBytes: undefined, promotionBytesPerSec: 134_217_728, syncOverflow: 'grow',
    })
    const { vpgs, ...all } = await load({ journalLimitBytes: 1000, reserveBytes: 0, vpgs: { web: { historyMs: 7_200_000, hardStopBytes: 1100 } } })
    expect(policyFrom(all, vpgs.web)).toMatchObject({ historyMs: 7_200_000, journalLimitBytes: 1000, warnBytes: 750, hardStopBytes: 1100 })
    expect(policyFrom(all, vpgs.mail)).toMatchObject({ historyMs: 86_400_000, hardStopBytes: 1500 })
    await expect(load({ historyMs: 5 })).rejects.toMatchObject({ code: 'BAD_INPUT' })
    await expect(load({ vpgs: { web: { histroyMs: 7_200_000 } } })).rejects.toMatchObject({ code: 'BAD_INPUT' })
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
})

test('mirrors: files by default, a disk before its VM before the site, a device only for one disk, nonsense is refused', async () => {
  const directory = await mkdtemp('/tmp/cdp-config-')
  try {
    const load = async (mirrors: object) => {
      await writeFile(join(directory, 'agent.json'), JSON.stringify({ mirrors }))
      return (await loadConfig(join(directory, 'agent.json'), AgentConfig)).mirrors
    }
    const [scsi0, scsi1] = [{ disk: 0, key: 'scsi0' }, { disk: 1, key: 'scsi1' }]
    expect(chooseMirror(await load({}), '/s/vms/site-a/101', scsi0)).toEqual({ kind: 'file' })
    const device = { kind: 'device', path: '/dev/vg/mirror-0', claim: true }
    const chosen = await load({ default: { kind: 'qcow2' }, vms: { '101': { default: { kind: 'qcow2', directory: '/srv/m' }, disks: { scsi0: device } }, 'site-b/101': { default: { kind: 'file' } } } })
    expect(chooseMirror(chosen, '/s/vms/site-a/101', scsi0)).toEqual(device)
    expect(chooseMirror(chosen, '/s/vms/site-a/101', scsi1)).toEqual({ kind: 'qcow2', path: '/srv/m/site-a.101.1.qcow2' })
    expect(chooseMirror(chosen, '/s/vms/site-b/101', scsi0)).toEqual({ kind: 'file' })
    expect(chooseMirror(chosen, '/s/vms/site-a/102', scsi0)).toEqual({ kind: 'qcow2', path: '/s/vms/site-a/102/mirror/0.qcow2' })
    for (const bad of [{ default: device }, { default: { kind: 'lvm' } }, { vms: { '101': { disks: { scsi0: { kind: 'device', path: 'vg/x' } } } } }, { vms: { '101': { disk: {} } } }]) {
      await expect(load(bad)).rejects.toMatchObject({ code: 'BAD_INPUT' })
    }
  } finally {
    await rm(directory, { recursive: true, force: true })
  }
})
